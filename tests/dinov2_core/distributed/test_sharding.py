"""sharding: several ranks do what one does, and a sharded teacher never lags."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from dinov2_core.config.execution import Execution
from dinov2_core.distributed.mesh import process_group
from dinov2_core.distributed.sharding import prefetch, shard_student
from dinov2_core.weights.loading import load_weights

RunRanks = Callable[..., list[int]]


@pytest.fixture(scope="module")
def outputs(
    run_ranks: RunRanks, shards: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[int, dict[str, Any]]:
    """The same step on one and on two ranks, and the two ranks' checkpoint on one and three."""
    folder = tmp_path_factory.mktemp("step")
    results = {}
    for world_size in (1, 2):
        output, checkpoints = folder / f"{world_size}.pt", folder / f"checkpoints{world_size}"
        codes = run_ranks("take_step", shards, output, checkpoints, world_size=world_size)
        assert codes == [0] * world_size
        results[world_size] = torch.load(output) | {"checkpoints": checkpoints}
    return results


def test_losses_and_gradients_of_two_ranks_equal_those_of_one(
    outputs: dict[int, dict[str, Any]],
) -> None:
    one, two = outputs[1], outputs[2]
    for name in ("total", "dino_local", "dino_global", "ibot", "koleo", "teacher_entropy"):
        assert two["losses"][name] == pytest.approx(one["losses"][name], abs=1e-5), name
    assert two["norms"] == pytest.approx(one["norms"], rel=1e-5)
    assert one["gradients"].keys() == two["gradients"].keys()
    for name, gradient in one["gradients"].items():
        torch.testing.assert_close(
            two["gradients"][name], gradient, atol=1e-5, rtol=1e-5, msg=lambda m, n=name: f"{n} {m}"
        )


def test_an_optimizer_step_of_two_ranks_equals_that_of_one(
    outputs: dict[int, dict[str, Any]],
) -> None:
    moved = 0
    for name, gradient in outputs[1]["gradients"].items():
        # Adam's first step is the sign of the gradient: rounding decides where it is nearly 0
        is_clear = gradient.abs() > 1e-4
        one, two = (outputs[n]["state"][f"model.student.{name}"] for n in (1, 2))
        torch.testing.assert_close(two[is_clear], one[is_clear], atol=1e-5, rtol=1e-5)
        moved += int((one != outputs[1]["before"][name])[is_clear].sum())
    assert moved > 1000


def test_all_ranks_stop_when_one_must(outputs: dict[int, dict[str, Any]]) -> None:
    assert not outputs[1]["must_stop"]
    assert outputs[2]["must_stop"]


@pytest.mark.parametrize("world_size", [1, 3])
def test_a_checkpoint_of_two_ranks_loads_on_others(
    outputs: dict[int, dict[str, Any]], run_ranks: RunRanks, tmp_path: Path, world_size: int
) -> None:
    output = tmp_path / "state.pt"
    codes = run_ranks("load_state", outputs[2]["checkpoints"], output, world_size=world_size)
    assert codes == [0] * world_size
    loaded = torch.load(output)
    assert loaded.keys() == outputs[2]["state"].keys()
    for name, tensor in outputs[2]["state"].items():
        assert torch.equal(loaded[name], tensor), name


def test_an_exported_teacher_holds_the_gathered_weights(
    outputs: dict[int, dict[str, Any]],
) -> None:
    prefix = "model.teacher."
    state = outputs[2]["state"]
    teacher = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}

    class Flat(nn.Module):
        def named_parameters(self, *_args: object, **_kwargs: object) -> Any:
            return iter(self.values.items())

        def __init__(self) -> None:
            super().__init__()
            self.values = {k: torch.zeros_like(v) for k, v in teacher.items()}

    module = Flat()
    path = outputs[2]["checkpoints"] / "teacher.safetensors"
    report = load_weights(module, load_file(path), source=str(path))
    assert set(report.loaded) == set(teacher)
    assert {name.partition(".")[0] for name in teacher} == {"backbone", "dino_head", "ibot_head"}
    for name, weight in teacher.items():
        assert torch.equal(module.values[name], weight), name


def test_a_teacher_is_fresh_after_its_shards_changed(
    outputs: dict[int, dict[str, Any]],
) -> None:
    error, error_of_default = outputs[2]["teacher_errors"]
    assert error < 1e-6
    assert error_of_default > 0.1


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_recomputed_activations_change_no_gradient(precision: str) -> None:
    gradients = []
    with process_group() as ranks:
        for recomputes in ("none", "full", "selective"):
            torch.manual_seed(0)
            module = nn.Sequential(nn.Linear(4, 8), nn.Sequential(nn.GELU(), nn.Linear(8, 2)))
            shard_student(
                [module],
                blocks=nn.ModuleList([module[1]]),
                mesh=ranks.mesh,
                precision=precision,  # type: ignore[arg-type]
                execution=Execution(recomputes_activations=recomputes),  # type: ignore[arg-type]
            )
            module(torch.ones(3, 4)).float().sum().backward()
            names = [name for name, _ in module.named_parameters()]
            gradients.append([p.grad.to_local().clone() for p in module.parameters()])
            assert names == ["0.weight", "0.bias", "1.1.weight", "1.1.bias"]
    assert all(g.dtype == torch.float32 for g in gradients[0])
    for other in gradients[1:]:
        assert all(torch.equal(a, b) for a, b in zip(gradients[0], other, strict=True))


def check_variants(errors: dict[str, dict[str, float]]) -> None:
    for name, error in errors.items():
        assert error["losses"] <= 1e-6, (name, error)
        assert error["gradients"] <= 1e-5, (name, error)


@pytest.mark.parametrize("world_size", [1, 2])
def test_no_way_of_computing_a_batch_changes_its_gradients(
    run_ranks: RunRanks, shards: Path, tmp_path: Path, world_size: int
) -> None:
    output = tmp_path / "errors.pt"
    codes = run_ranks("take_variants", shards, output, Path("eager"), world_size=world_size)
    assert codes == [0] * world_size
    errors = torch.load(output)
    assert errors.pop("failure") == {"0": 1.0}
    assert ("2 replicas in parts" in errors) == (world_size == 2)
    check_variants(errors)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "world_size"), [("compiled", 2), ("eager", 4)])
def test_neither_compilation_nor_two_by_two_ranks_change_gradients(
    run_ranks: RunRanks, shards: Path, tmp_path: Path, kind: str, world_size: int
) -> None:
    output = tmp_path / "errors.pt"
    codes = run_ranks(
        "take_variants", shards, output, Path(kind), world_size=world_size, timeout_seconds=280
    )
    assert codes == [0] * world_size
    errors = torch.load(output)
    errors.pop("failure", None)
    check_variants(errors)


def test_blocks_are_prefetched_both_ways() -> None:
    with process_group() as ranks:
        blocks = [nn.Linear(4, 4) for _ in range(3)]
        module = nn.Sequential(*blocks)
        shard_student(
            [module],
            blocks=nn.ModuleList(blocks),
            mesh=ranks.mesh,
            precision="fp32",
            execution=Execution(),
        )
        prefetch(blocks)
        module(torch.ones(2, 4)).sum().backward()
        assert all(p.grad is not None for p in module.parameters())
