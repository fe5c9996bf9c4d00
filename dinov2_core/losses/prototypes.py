"""Scores against K prototypes, chunk by chunk: the [M, K] matrix of scores never exists."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dinov2_core.device_kind import device_kind
from dinov2_core.losses.precision import bfloat16_units, without_autocast

CHUNK_SIZE = 16_384
"""Prototypes per chunk; the same on every rank, because Sinkhorn-Knopp communicates per chunk."""

CPU_CHUNK_SIZE = 4_096
"""At most so many on a CPU, where fresh memory for larger chunks costs more than computing them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Assignments:
    """Teacher targets Q[i, j] = exp(feature_i . prototype_j / temperature + s_i + r_j)."""

    features: Tensor
    """[M, d] normalised teacher features."""
    prototypes: Tensor
    """[K, d] teacher prototypes."""
    temperature: float
    """Divides the teacher's scores."""
    sample_scaling: Tensor
    """[M] s, float32: makes every row sum to 1, or to 0 where it is minus infinity."""
    prototype_scaling: Tensor
    """[K] r, float32: Sinkhorn's column scaling, or minus the centre over the temperature."""

    def split(self, sizes: Sequence[int]) -> tuple[Assignments, ...]:
        """The same targets, so many rows in each part."""
        features = torch.split(self.features, list(sizes))
        scalings = torch.split(self.sample_scaling, list(sizes))
        return tuple(
            replace(self, features=own, sample_scaling=scaling)
            for own, scaling in zip(features, scalings, strict=True)
        )


def chunks(prototypes: Tensor, *, chunk_size: int) -> Iterator[slice]:
    """Slices that cover the prototypes [K, ..] in order."""
    if device_kind(prototypes) == "cpu":
        chunk_size = min(chunk_size, CPU_CHUNK_SIZE)
    for start in range(0, prototypes.shape[0], chunk_size):
        yield slice(start, min(start + chunk_size, prototypes.shape[0]))


def scores(
    features: Tensor, *, prototypes: Tensor, temperature: float, shift: Tensor | None = None
) -> Tensor:
    """Dot products over temperature [M, K], accumulated and returned in float32.

    Args:
        features: [M, d].
        prototypes: [K, d].
        temperature: Divides the products.
        shift: Added after that in the same pass, [M, 1] or [K]; None adds nothing.
    """
    products = _product(features, right=prototypes.T)
    if shift is None:
        return products.mul_(1 / temperature)
    return torch.add(shift, products, alpha=1 / temperature, out=products)


def log_sum_exp(values: Tensor, *, dim: int) -> Tensor:
    """Log of the sum of exp along a dimension, without gradient; minus infinity of nothing.

    In plain passes: torch's own takes twice as long on a CPU. In place, because fresh memory would
    cost as much as the passes: the values are lost.
    """
    highest = highest_of(values, dim=dim)
    return values.sub_(highest.unsqueeze(dim)).exp_().sum(dim=dim).log_().add_(highest)


def highest_of(values: Tensor, *, dim: int) -> Tensor:
    """Largest value along a dimension; the smallest number there is of nothing."""
    smallest = torch.finfo(values.dtype).min
    if values.shape[dim] == 0:
        return values.sum(dim=dim).fill_(smallest)
    return values.amax(dim=dim).clamp_(min=smallest)


def log_partition(
    features: Tensor, *, prototypes: Tensor, temperature: float, chunk_size: int = CHUNK_SIZE
) -> Tensor:
    """Logarithm of the softmax denominator over all prototypes, differentiable in both.

    Args:
        features: Student features [M, d], float32 or bfloat16.
        prototypes: Student prototypes [K, d], same type.
        temperature: Divides the scores; > 0, no unit.
        chunk_size: Prototypes whose scores exist at a time.

    Returns:
        log sum_j exp(feature_i . prototype_j / temperature), [M], float32.
    """
    result: Tensor = _LogPartition.apply(features, prototypes, temperature, chunk_size)
    return result


def expected_prototypes(
    assignments: Assignments, *, prototypes: Tensor, chunk_size: int = CHUNK_SIZE
) -> Tensor:
    """Student prototypes averaged under the teacher's targets, differentiable in the prototypes.

    The expected score of a student feature f under target i is f . result_i, so that one target
    serves any number of student features: cross-entropy = log_partition(f) - f . result_i / T.

    Args:
        assignments: Targets Q of M samples over K prototypes.
        prototypes: Student prototypes [K, d], float32 or bfloat16.
        chunk_size: Prototypes whose targets exist at a time.

    Returns:
        sum_j Q[i, j] prototype_j, [M, d], float32.
    """
    result: Tensor = _ExpectedPrototypes.apply(prototypes, assignments, chunk_size)
    return result


def without_padding(sample_scaling: Tensor, *, is_sample: Tensor | None) -> Tensor:
    """Sample scalings [M] whose targets are 0 where `is_sample` [M] is false."""
    if is_sample is None:
        return sample_scaling
    return sample_scaling.masked_fill(~is_sample, -torch.inf)


def log_sums(
    features: Tensor,
    *,
    prototypes: Tensor,
    temperature: float,
    shift: Tensor | None = None,
    chunk_size: int,
) -> Tensor:
    """`log_partition` without gradient; shift [K] is added to the scores over temperature."""
    total = features.new_full((features.shape[0],), -torch.inf, dtype=torch.float32)
    for columns in chunks(prototypes, chunk_size=chunk_size):
        chunk = scores(
            features,
            prototypes=prototypes[columns],
            temperature=temperature,
            shift=None if shift is None else shift[columns],
        )
        total = torch.logaddexp(total, log_sum_exp(chunk, dim=1))
    return total


@dataclass(frozen=True, slots=True, kw_only=True)
class AssignmentHealth:
    """Numbers that tell a healthy teacher from a collapsed one."""

    entropy: Tensor
    """Mean entropy of the targets, nats: log K when uniform, 0 when one-hot."""
    usage: Tensor
    """Distinct best-scoring prototypes per sample, in (0, 1]: 1 / M when all samples share one."""


@torch.no_grad()
def assignment_health(
    assignments: Assignments, *, chunk_size: int = CHUNK_SIZE
) -> AssignmentHealth:
    """Entropy of the targets and spread of the raw scores' winners over this rank's samples."""
    num_samples = assignments.features.shape[0]
    entropy = assignments.sample_scaling.new_zeros(num_samples)
    best = torch.full_like(entropy, -torch.inf)
    winners = torch.zeros_like(entropy, dtype=torch.int64)
    for columns, targets in _assignment_chunks(assignments, chunk_size=chunk_size):
        entropy += torch.special.entr(targets).sum(dim=1)
        raw = scores(
            assignments.features, prototypes=assignments.prototypes[columns], temperature=1.0
        )
        highest = raw.max(dim=1)
        winners = torch.where(highest.values > best, highest.indices + columns.start, winners)
        best = torch.maximum(best, highest.values)
    changes = winners.sort().values.diff().ne(0).sum()
    return AssignmentHealth(entropy=entropy.mean(), usage=(changes + 1) / max(num_samples, 1))


def _assignment_chunks(
    assignments: Assignments, *, chunk_size: int
) -> Iterator[tuple[slice, Tensor]]:
    """The targets [M, chunk] of one chunk of prototypes after the other."""
    for columns in chunks(assignments.prototypes, chunk_size=chunk_size):
        log_targets = scores(
            assignments.features,
            prototypes=assignments.prototypes[columns],
            temperature=assignments.temperature,
            shift=assignments.prototype_scaling[columns],
        )
        log_targets += assignments.sample_scaling[:, None]
        yield columns, log_targets.exp_()


def _product(left: Tensor, *, right: Tensor) -> Tensor:
    """Matrix product in float32; with a right factor in bfloat16 the left one is rounded to it."""
    is_half = right.dtype == torch.bfloat16
    with without_autocast(left.device):
        if device_kind(left) == "cuda" and right.dtype != torch.float32:
            return torch.mm(left.to(right.dtype), right, out_dtype=torch.float32)
        with bfloat16_units() if is_half else nullcontext():
            return left.float() @ right.float()


def _gradient_product(left: Tensor, *, right: Tensor, out: Tensor | None = None) -> Tensor:
    """Matrix product of a gradient that ends in the factors' type, summed in float32.

    A CPU has no product of bfloat16 factors with a float32 result: rounding the result, as the
    gradient is in the end, runs five times faster than float32 factors.
    """
    if device_kind(left) == "cpu" and left.dtype == right.dtype == torch.bfloat16:
        with without_autocast(left.device):
            return torch.mm(left, right, out=out)
    product = _product(left, right=right)
    return product if out is None else out.copy_(product)


class _LogPartition(torch.autograd.Function):
    """Online log-sum-exp forward; the softmax of each chunk is computed again backward."""

    @staticmethod
    def forward(
        ctx: Any, features: Tensor, prototypes: Tensor, temperature: float, chunk_size: int
    ) -> Tensor:
        total = log_sums(
            features, prototypes=prototypes, temperature=temperature, chunk_size=chunk_size
        )
        ctx.save_for_backward(features, prototypes, total)
        ctx.temperature, ctx.chunk_size = temperature, chunk_size
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, None, None]:
        features, prototypes, total = ctx.saved_tensors
        weight = (grad_outputs[0].float() / ctx.temperature)[:, None]
        weighted = (weight * features).to(features.dtype)
        features_grad = torch.zeros_like(features, dtype=torch.float32)
        prototypes_grad = torch.empty_like(prototypes)
        for columns in chunks(prototypes, chunk_size=ctx.chunk_size):
            chunk = scores(
                features,
                prototypes=prototypes[columns],
                temperature=ctx.temperature,
                shift=-total[:, None],
            )
            softmax = chunk.exp_().to(features.dtype)
            features_grad += _gradient_product(softmax, right=prototypes[columns])
            _gradient_product(softmax.T, right=weighted, out=prototypes_grad[columns])
        return features_grad.mul_(weight).to(features.dtype), prototypes_grad, None, None


class _ExpectedPrototypes(torch.autograd.Function):
    """Computes each chunk of targets forward and again backward; no gradient for the teacher."""

    @staticmethod
    def forward(ctx: Any, prototypes: Tensor, assignments: Assignments, chunk_size: int) -> Tensor:
        expected = prototypes.new_zeros(
            assignments.features.shape[0], prototypes.shape[1], dtype=torch.float32
        )
        for columns, targets in _assignment_chunks(assignments, chunk_size=chunk_size):
            expected += _product(targets, right=prototypes[columns])
        ctx.assignments, ctx.chunk_size = assignments, chunk_size
        ctx.shape, ctx.dtype = prototypes.shape, prototypes.dtype
        return expected

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        prototypes_grad = grad_outputs[0].new_empty(ctx.shape, dtype=ctx.dtype)
        grad = grad_outputs[0].to(ctx.dtype)
        for columns, targets in _assignment_chunks(ctx.assignments, chunk_size=ctx.chunk_size):
            _gradient_product(targets.to(ctx.dtype).T, right=grad, out=prototypes_grad[columns])
        return prototypes_grad, None, None
