import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dinov2_core.losses.sinkhorn import SinkhornTargets, sinkhorn_knopp
from tests.dinov2_core.losses.dense import dense_targets


def unit(*shape: int, seed: int) -> Tensor:
    return F.normalize(torch.randn(shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def dense_sinkhorn_knopp(logits: Tensor, *, temperature: float, num_iterations: int) -> Tensor:
    """Alternate normalisation of the exponentiated matrix, in float64."""
    assignments = (logits.double() / temperature).exp()
    num_samples, num_prototypes = logits.shape
    for _ in range(num_iterations):
        assignments /= assignments.sum(0, keepdim=True) * num_prototypes
        assignments /= assignments.sum(1, keepdim=True) * num_samples
    return assignments * num_samples


@pytest.mark.parametrize("num_iterations", [1, 2, 3, 10])
@pytest.mark.parametrize("chunk_size", [1, 4, 11, 50])
def test_assignments_equal_the_dense_alternation(num_iterations: int, chunk_size: int) -> None:
    features, prototypes = unit(6, 5, seed=0), unit(11, 5, seed=1)
    actual = sinkhorn_knopp(
        features,
        prototypes=prototypes,
        temperature=0.07,
        num_iterations=num_iterations,
        chunk_size=chunk_size,
    )
    expected = dense_sinkhorn_knopp(
        features @ prototypes.T, temperature=0.07, num_iterations=num_iterations
    )
    torch.testing.assert_close(dense_targets(actual).double(), expected, atol=1e-6, rtol=1e-5)


def test_rows_sum_to_one_and_prototypes_weigh_the_same() -> None:
    targets = dense_targets(
        sinkhorn_knopp(
            unit(40, 5, seed=0), prototypes=unit(7, 5, seed=1), temperature=0.3, num_iterations=50
        )
    )
    torch.testing.assert_close(targets.sum(1), torch.ones(40))
    torch.testing.assert_close(targets.sum(0), torch.full((7,), 40 / 7), atol=1e-3, rtol=0)


def test_long_prototypes_do_not_overflow() -> None:
    features, prototypes = unit(6, 5, seed=0), 50 * unit(11, 5, seed=1)
    actual = sinkhorn_knopp(features, prototypes=prototypes, temperature=0.4, num_iterations=3)
    expected = dense_sinkhorn_knopp(features @ prototypes.T, temperature=0.4, num_iterations=3)
    torch.testing.assert_close(dense_targets(actual).double(), expected, atol=1e-4, rtol=1e-3)
    hotter = sinkhorn_knopp(features, prototypes=prototypes, temperature=0.04, num_iterations=3)
    assert torch.isfinite(dense_targets(hotter)).all()  # scores of 1250: exp would overflow


def test_prototype_lengths_cancel_only_as_far_as_scores_do() -> None:
    """Adding a constant to a column of scores changes nothing: columns are normalised."""
    features = torch.cat([unit(6, 4, seed=0), torch.ones(6, 1)], dim=1)
    prototypes = torch.cat([unit(11, 4, seed=1), torch.zeros(11, 1)], dim=1)
    shifted = prototypes.clone()
    shifted[:, 4] = torch.linspace(-0.3, 0.3, 11)
    plain, moved = (
        dense_targets(sinkhorn_knopp(features, prototypes=p, temperature=0.1, num_iterations=3))
        for p in (prototypes, shifted)
    )
    torch.testing.assert_close(plain, moved, atol=1e-5, rtol=1e-4)


def test_order_of_samples_is_kept() -> None:
    features, prototypes = unit(6, 5, seed=0), unit(11, 5, seed=1)
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    plain, permuted = (
        dense_targets(sinkhorn_knopp(x, prototypes=prototypes, temperature=0.1, num_iterations=3))
        for x in (features, features[order])
    )
    torch.testing.assert_close(plain[order], permuted)


def test_module_passes_its_iterations_on() -> None:
    features, prototypes = unit(6, 5, seed=0), unit(11, 5, seed=1)
    module = SinkhornTargets(num_iterations=2)
    assert not module.state_dict()
    expected = dense_sinkhorn_knopp(features @ prototypes.T, temperature=0.1, num_iterations=2)
    actual = dense_targets(module(features, prototypes=prototypes, temperature=0.1))
    torch.testing.assert_close(actual.double(), expected, atol=1e-6, rtol=1e-5)


def test_rows_that_only_pad_count_for_nothing() -> None:
    features, prototypes = unit(6, 5, seed=0), unit(11, 5, seed=1)
    padded = torch.cat([features, features[:1].expand(3, -1)])
    is_sample = torch.arange(9) < 6
    plain, with_padding = (
        dense_targets(
            sinkhorn_knopp(
                rows, prototypes=prototypes, temperature=0.05, num_iterations=3, is_sample=samples
            )
        )
        for rows, samples in ((features, None), (padded, is_sample))
    )
    torch.testing.assert_close(with_padding[:6], plain, atol=1e-6, rtol=0)
    assert not with_padding[6:].any()


def test_nothing_but_padding_has_no_targets() -> None:
    targets = dense_targets(
        sinkhorn_knopp(
            unit(3, 5, seed=0),
            prototypes=unit(11, 5, seed=1),
            temperature=0.05,
            num_iterations=3,
            is_sample=torch.zeros(3, dtype=torch.bool),
        )
    )
    assert not targets.any()
