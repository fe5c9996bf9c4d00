"""Two processes with unequal shares against one that holds everything."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from dinov2_core.losses.centering import CenteredTargets
from dinov2_core.losses.collectives import gather_rows, log_sum_over_ranks, sum_over_ranks
from dinov2_core.losses.koleo import koleo_loss
from dinov2_core.losses.sinkhorn import sinkhorn_knopp
from tests.dinov2_core.losses.dense import dense_targets

REPOSITORY = Path(__file__).parents[3]
SHARES = (slice(0, 5), slice(5, 12))


def unit(*shape: int, seed: int) -> Tensor:
    return F.normalize(torch.randn(shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def results(rows: slice) -> dict[str, Any]:
    """Everything collective, on a share of the samples."""
    prototypes = unit(23, 5, seed=1)
    teacher = unit(12, 5, seed=0)[rows]
    sinkhorn = sinkhorn_knopp(
        teacher, prototypes=prototypes, temperature=0.07, num_iterations=3, chunk_size=10
    )
    # The first rank of two has nothing to assign.
    empty = rows.stop == SHARES[0].stop
    lopsided = sinkhorn_knopp(
        teacher[:0] if empty else teacher,
        prototypes=prototypes,
        temperature=0.07,
        num_iterations=3,
    )
    centering = CenteredTargets(num_prototypes=23, momentum=0.9)
    for _ in range(2):
        centered = centering(teacher, prototypes=prototypes, temperature=0.05)
    features = unit(12, 5, seed=2)[rows].requires_grad_()
    koleo = koleo_loss(features, neighbours="global_batch")
    koleo.backward()
    return {
        "sinkhorn": dense_targets(sinkhorn),
        "lopsided": dense_targets(lopsided),
        "centered": dense_targets(centered),
        "center": centering.center,
        "koleo": koleo.detach(),
        "koleo_grad": features.grad,
        "rank_koleo": koleo_loss(features.detach(), neighbours="rank"),
        "sum": sum_over_ranks(teacher.sum(0)),
        "log_sum": log_sum_over_ranks(teacher.logsumexp(0)),
        "gathered": gather_rows(teacher).rows,
        "first_row": gather_rows(teacher).first_row,
    }


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    directory = tmp_path_factory.mktemp("ranks")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    processes = [
        subprocess.Popen([sys.executable, __file__, str(rank), str(directory)], env=environment)
        for rank in range(2)
    ]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    return [torch.load(directory / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.fixture(scope="module")
def whole() -> dict[str, Any]:
    return results(slice(0, 12))


@pytest.mark.parametrize("name", ["sinkhorn", "centered"])
def test_targets_do_not_depend_on_the_split(
    ranks: list[dict[str, Any]], whole: dict[str, Any], name: str
) -> None:
    for share, rows in zip(ranks, SHARES, strict=True):
        torch.testing.assert_close(share[name], whole[name][rows], atol=1e-6, rtol=1e-5)


def test_center_is_the_mean_over_all_samples(
    ranks: list[dict[str, Any]], whole: dict[str, Any]
) -> None:
    assert whole["center"].abs().max() > 0
    for share in ranks:
        torch.testing.assert_close(share["center"], whole["center"])


def test_a_rank_without_samples_takes_part(ranks: list[dict[str, Any]]) -> None:
    alone = sinkhorn_knopp(
        unit(12, 5, seed=0)[SHARES[1]],
        prototypes=unit(23, 5, seed=1),
        temperature=0.07,
        num_iterations=3,
    )
    assert ranks[0]["lopsided"].shape == (0, 23)
    torch.testing.assert_close(ranks[1]["lopsided"], dense_targets(alone), atol=1e-6, rtol=1e-5)


def test_averaged_koleo_and_its_gradient_are_those_of_one_process(
    ranks: list[dict[str, Any]], whole: dict[str, Any]
) -> None:
    torch.testing.assert_close((ranks[0]["koleo"] + ranks[1]["koleo"]) / 2, whole["koleo"])
    for share, rows in zip(ranks, SHARES, strict=True):
        torch.testing.assert_close(share["koleo_grad"] / 2, whole["koleo_grad"][rows])


def test_koleo_of_a_rank_ignores_the_others(ranks: list[dict[str, Any]]) -> None:
    for share, rows in zip(ranks, SHARES, strict=True):
        expected = koleo_loss(unit(12, 5, seed=2)[rows], neighbours="rank")
        torch.testing.assert_close(share["rank_koleo"], expected)


def test_sums_and_rows_cover_all_ranks(ranks: list[dict[str, Any]], whole: dict[str, Any]) -> None:
    for share, rows in zip(ranks, SHARES, strict=True):
        torch.testing.assert_close(share["sum"], whole["sum"])
        torch.testing.assert_close(share["log_sum"], whole["log_sum"])
        assert torch.equal(share["gathered"], whole["gathered"])
        assert share["first_row"] == rows.start


def run_rank(rank: int, directory: Path) -> None:
    store = dist.FileStore(str(directory / "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    torch.save(results(SHARES[rank]), directory / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    run_rank(int(sys.argv[1]), Path(sys.argv[2]))
