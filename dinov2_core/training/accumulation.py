"""Gradients of a batch that is computed in parts, equal to those of the whole batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce

import torch
from torch import Tensor

from dinov2_core.data.batch import PretrainBatch
from dinov2_core.distributed.sharding import reduce_gradients
from dinov2_core.losses.terms import CoupledTerm
from dinov2_core.training.objective import Losses, losses_of
from dinov2_core.training.random_state import RandomState
from dinov2_core.training.student_teacher import StudentTeacher, WholeBatch


def accumulate_gradients(
    model: StudentTeacher,
    parts: Sequence[PretrainBatch],
    *,
    teacher_temperature: float,
    before_backward: Callable[[], None] = lambda: None,
) -> Losses:
    """Losses of the whole batch; its gradients are added to those of the student. Collective.

    Targets are assigned once over the whole batch: the teacher runs part by part and only its
    head outputs stay. Coupled terms need all images at once, so that their gradient with respect
    to the cls tokens of all parts is computed first, from forward passes without a graph, and
    injected into the backward pass of each part (the two passes of GradCache, arXiv:2101.06983).
    The second pass drops the same paths as the first.

    Several parts cost one more forward pass of the student than the undivided batch, none without
    coupled terms, and whole instead of sharded gradients on every rank until the last part.

    Args:
        model: Student, teacher and objective.
        parts: Equal parts of this rank's images, from `PretrainBatch.split`.
        teacher_temperature: Divides the teacher's scores; > 0, no unit.
        before_backward: Called before every backward pass.
    """
    targets = model.teacher_targets(parts, temperature=teacher_temperature)
    wholes = _whole_batches(model, parts) if len(parts) > 1 else [None]
    by_part: list[dict[str, Tensor]] = []
    for part, own, whole in zip(parts, targets.split(parts), wholes, strict=True):
        reduce_gradients(model.student.children(), enabled=part is parts[-1])
        if whole and whole.random_state:
            whole.random_state.restore()
        losses = model(part, targets=own, whole=whole)
        before_backward()
        torch.autograd.backward(losses.objective)
        by_part.append(losses.by_name)
    is_coupled = {name for term in (wholes[0].coupled if wholes[0] else ()) for name in term}
    terms = {
        name: loss if name in is_coupled else torch.stack([part[name] for part in by_part]).mean()
        for name, loss in by_part[0].items()
    }
    return losses_of(terms, targets=targets)


def _whole_batches(model: StudentTeacher, parts: Sequence[PretrainBatch]) -> list[WholeBatch]:
    """For each part, the coupled terms of the whole batch, computed before any has a graph."""
    terms = [term for term in model.terms if isinstance(term, CoupledTerm)]
    if not terms:
        return [WholeBatch(num_parts=len(parts)) for _ in parts]
    states, leaves = [], []
    for part in parts:
        states.append(RandomState.now(part.global_crops.device))
        with torch.no_grad():
            leaves.append(model.student_features(part)[0].cls.float())
    halves = [tokens.requires_grad_().chunk(2) for tokens in leaves]
    cls_tokens = torch.cat([half[crop] for crop in (0, 1) for half in halves])
    losses = [term.losses(cls_tokens) for term in terms]
    weighted = [t.weight * x for t, own in zip(terms, losses, strict=True) for x in own.values()]
    gradients = torch.autograd.grad(reduce(torch.add, weighted), leaves)
    coupled = tuple({name: loss.detach() for name, loss in own.items()} for own in losses)
    return [
        WholeBatch(num_parts=len(parts), coupled=coupled, cls_gradient=gradient, random_state=state)
        for gradient, state in zip(gradients, states, strict=True)
    ]
