import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dinov2_core.losses.ibot import ibot_loss
from dinov2_core.losses.prototypes import (
    Assignments,
    assignment_health,
    expected_prototypes,
    log_partition,
    log_sum_exp,
)
from dinov2_core.losses.sinkhorn import sinkhorn_knopp
from dinov2_core.losses.terms import LossInputs, Predictions
from tests.dinov2_core.losses.dense import dense_targets


def unit(*shape: int, seed: int) -> Tensor:
    return F.normalize(torch.randn(shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def make_assignments(*, num_samples: int = 7, num_prototypes: int = 23) -> Assignments:
    return sinkhorn_knopp(
        unit(num_samples, 5, seed=0),
        prototypes=unit(num_prototypes, 5, seed=1),
        temperature=0.07,
        num_iterations=3,
    )


@pytest.mark.parametrize("chunk_size", [1, 5, 23, 100])
def test_log_partition_equals_the_dense_log_sum(chunk_size: int) -> None:
    features = unit(7, 5, seed=2).requires_grad_()
    prototypes = (unit(23, 5, seed=3) * 1.3).requires_grad_()
    weights = torch.rand(7, generator=torch.Generator().manual_seed(4))
    actual = log_partition(features, prototypes=prototypes, temperature=0.1, chunk_size=chunk_size)
    expected = (features.double() @ prototypes.double().T / 0.1).logsumexp(1)
    torch.testing.assert_close(actual.double(), expected, atol=0, rtol=1e-6)
    grads = torch.autograd.grad(actual @ weights, (features, prototypes))
    dense_grads = torch.autograd.grad(expected @ weights.double(), (features, prototypes))
    for grad, dense in zip(grads, dense_grads, strict=True):
        assert (grad - dense).norm() <= 1e-6 * dense.norm()


@pytest.mark.parametrize("chunk_size", [1, 5, 23, 100])
def test_expected_prototypes_equal_the_dense_product(chunk_size: int) -> None:
    assignments = make_assignments()
    prototypes = unit(23, 5, seed=3).requires_grad_()
    weights = torch.randn(7, 5, generator=torch.Generator().manual_seed(4))
    actual = expected_prototypes(assignments, prototypes=prototypes, chunk_size=chunk_size)
    expected = dense_targets(assignments) @ prototypes
    torch.testing.assert_close(actual, expected, atol=1e-6, rtol=1e-6)
    (grad,) = torch.autograd.grad((actual * weights).sum(), prototypes)
    (dense,) = torch.autograd.grad((expected * weights).sum(), prototypes)
    assert (grad - dense).norm() <= 1e-6 * dense.norm()


def test_large_scores_do_not_overflow() -> None:
    features = unit(4, 5, seed=2).requires_grad_()
    prototypes = (features.detach() * 1000).requires_grad_()
    total = log_partition(features, prototypes=prototypes, temperature=0.01)
    torch.testing.assert_close(total, torch.full((4,), 1e5))
    total.sum().backward()
    assert features.grad is not None
    assert torch.isfinite(features.grad).all()


def test_half_precision_factors_accumulate_in_float32() -> None:
    features = unit(7, 5, seed=2).bfloat16().requires_grad_()
    prototypes = unit(23, 5, seed=3).bfloat16().requires_grad_()
    actual = log_partition(features, prototypes=prototypes, temperature=0.1, chunk_size=6)
    expected = (features.double() @ prototypes.double().T / 0.1).logsumexp(1)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual.double(), expected, atol=0, rtol=1e-6)
    grads = torch.autograd.grad(actual.sum(), (features, prototypes))
    dense_grads = torch.autograd.grad(expected.sum(), (features, prototypes))
    for grad, dense in zip(grads, dense_grads, strict=True):
        assert grad.dtype == torch.bfloat16
        assert (grad.float() - dense.float()).norm() <= 1e-2 * dense.float().norm()


def test_half_precision_prototypes_are_averaged_in_float32() -> None:
    assignments = make_assignments()
    prototypes = unit(23, 5, seed=3).bfloat16().requires_grad_()
    actual = expected_prototypes(assignments, prototypes=prototypes, chunk_size=6)
    targets = dense_targets(assignments).double()
    expected, half_a_bit = (
        targets @ prototypes.double(),
        2**-9 * (targets @ prototypes.abs().double()),
    )
    assert actual.dtype == torch.float32
    assert ((actual - expected).abs() <= half_a_bit + 1e-6).all()
    (grad,) = torch.autograd.grad(actual.sum(), prototypes)
    assert grad.dtype == torch.bfloat16


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_computes_what_the_cpu_does() -> None:
    results = []
    for device in ("cpu", "cuda"):
        features = unit(64, 32, seed=2).bfloat16().to(device).requires_grad_()
        prototypes = unit(1000, 32, seed=3).bfloat16().to(device).requires_grad_()
        teacher = unit(64, 32, seed=4).bfloat16().to(device)
        loss = chunked_loss(features, prototypes, teacher, prototypes.detach())
        grads = torch.autograd.grad(loss, (features, prototypes))
        results.append([value.float().cpu() for value in (loss, *grads)])
    for on_cpu, on_cuda in zip(*results, strict=True):
        torch.testing.assert_close(on_cuda, on_cpu, atol=1e-4, rtol=2e-2)


def test_autocast_does_not_lower_the_scores_precision() -> None:
    features, prototypes = unit(7, 5, seed=2), unit(23, 5, seed=3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = log_partition(features, prototypes=prototypes, temperature=0.1)
    assert torch.equal(inside, log_partition(features, prototypes=prototypes, temperature=0.1))


def test_no_samples_are_no_special_case() -> None:
    prototypes = unit(23, 5, seed=3).requires_grad_()
    features = torch.zeros(0, 5, requires_grad=True)
    assignments = make_assignments(num_samples=0)
    total = log_partition(features, prototypes=prototypes, temperature=0.1)
    expected = expected_prototypes(assignments, prototypes=prototypes)
    (total.sum() + expected.sum()).backward()
    assert prototypes.grad is not None
    assert not prototypes.grad.any()


def test_health_counts_entropy_and_distinct_winners() -> None:
    assignments = make_assignments()
    targets = dense_targets(assignments)
    winners = (assignments.features @ assignments.prototypes.T).argmax(1)
    health = assignment_health(assignments, chunk_size=5)
    expected = -(targets * targets.log()).sum(1).mean()
    torch.testing.assert_close(health.entropy, expected, atol=1e-5, rtol=1e-5)
    assert health.usage.item() == pytest.approx(len(set(winners.tolist())) / 7)


def test_collapse_shows_as_one_winner() -> None:
    same = unit(1, 5, seed=0).expand(6, 5)
    assignments = sinkhorn_knopp(
        same, prototypes=unit(23, 5, seed=1), temperature=0.07, num_iterations=3
    )
    assert assignment_health(assignments).usage.item() == pytest.approx(1 / 6)


class PeakMemory(TorchDispatchMode):
    """Adds up the bytes of the storages that live at the same time inside the block."""

    def __init__(self) -> None:
        super().__init__()
        self._living: dict[int, int] = {}
        self.peak_bytes = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        outputs = func(*args, **(kwargs or {}))
        known = {t.untyped_storage()._cdata for t in args if isinstance(t, Tensor)}
        for output in outputs if isinstance(outputs, tuple | list) else (outputs,):
            if isinstance(output, Tensor) and output.untyped_storage()._cdata not in known:
                self._follow(output)
        self.peak_bytes = max(self.peak_bytes, sum(self._living.values()))
        return outputs

    def _follow(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._living:
            self._living[key] = storage.nbytes()
            weakref.finalize(storage, self._living.pop, key, None)


def dense_loss(
    features: Tensor, prototypes: Tensor, teacher_features: Tensor, teacher_prototypes: Tensor
) -> Tensor:
    """The reference's formulation: whole matrices of scores, targets and log-probabilities."""
    with torch.no_grad():
        targets = torch.exp(teacher_features @ teacher_prototypes.T / 0.07).T
        targets /= targets.sum()
        for _ in range(3):
            targets /= targets.sum(dim=1, keepdim=True)
            targets /= targets.shape[0]
            targets /= targets.sum(dim=0, keepdim=True)
            targets /= targets.shape[1]
        targets = (targets * targets.shape[1]).T
    logits = features @ prototypes.T
    return -(targets * F.log_softmax(logits / 0.1, dim=1)).sum() / features.shape[0]


def chunked_loss(
    features: Tensor, prototypes: Tensor, teacher_features: Tensor, teacher_prototypes: Tensor
) -> Tensor:
    targets = sinkhorn_knopp(
        teacher_features, prototypes=teacher_prototypes, temperature=0.07, num_iterations=3
    )
    num_samples = features.shape[0]
    predictions = Predictions(features=features, prototypes=prototypes, targets=targets)
    empty = features.new_empty(num_samples, 0)
    inputs = LossInputs(
        global_crops=empty,
        cls_tokens=empty,
        patch_tokens=empty,
        cls=predictions,
        patches=predictions,
        mask_weights=features.new_ones(num_samples),
    )
    return ibot_loss(inputs, student_temperature=0.1)["ibot"]


Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def peak_bytes(loss: Loss, *, num_samples: int, num_prototypes: int, device: str) -> int:
    def matrix(rows: int) -> Tensor:
        return torch.full((rows, 256), 0.1, device=device)

    features = matrix(num_samples).requires_grad_()
    prototypes = matrix(num_prototypes).requires_grad_()
    teacher_features, teacher_prototypes = matrix(num_samples), matrix(num_prototypes)
    with PeakMemory() as memory:
        loss(features, prototypes, teacher_features, teacher_prototypes).backward()
    return memory.peak_bytes


def test_memory_is_at_most_a_quarter_of_the_dense_versions() -> None:
    """At the size of the long recipe; the meta device allocates without computing."""
    size = {"num_samples": 2500, "num_prototypes": 131_072, "device": "meta"}
    chunked, dense = peak_bytes(chunked_loss, **size), peak_bytes(dense_loss, **size)  # type: ignore[arg-type]
    assert dense > 3 * 2500 * 131_072 * 4  # the measurement sees several matrices
    assert chunked <= dense / 4


def test_memory_of_a_real_device_is_that_of_the_meta_device() -> None:
    size = {"num_samples": 16, "num_prototypes": 40_000}
    for loss in (chunked_loss, dense_loss):
        measured = [peak_bytes(loss, **size, device=device) for device in ("meta", "cpu")]
        assert measured[1] == pytest.approx(measured[0], rel=0.02)


def test_chunked_loss_equals_the_references_formulation() -> None:
    inputs = [
        unit(40, 16, seed=0).requires_grad_(),
        unit(300, 16, seed=1).requires_grad_(),
        unit(40, 16, seed=2),
        unit(300, 16, seed=3),
    ]
    exact = [x.detach().double().requires_grad_(x.requires_grad) for x in inputs]
    chunked, dense = chunked_loss(*inputs), dense_loss(*exact)
    assert abs(chunked.item() - dense.item()) <= 1e-6 * dense.item()
    grads = torch.autograd.grad(chunked, inputs[:2])
    dense_grads = torch.autograd.grad(dense, exact[:2])
    for grad, expected in zip(grads, dense_grads, strict=True):
        assert (grad - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize("dim", [0, 1])
def test_log_sum_exp_is_torchs_even_of_nothing(dim: int) -> None:
    values = torch.randn(7, 5, generator=torch.Generator().manual_seed(0)) * 500
    values[:, 2] = values[3] = -torch.inf
    actual = log_sum_exp(values.clone(), dim=dim)
    torch.testing.assert_close(actual, values.logsumexp(dim=dim))
