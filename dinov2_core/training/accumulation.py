"""Gradients of a batch that is computed in parts, equal to those of the whole batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
    coupled = _coupled_ahead(model, parts) if len(parts) > 1 else None
    by_part: list[dict[str, Tensor]] = []
    for number, (part, own) in enumerate(zip(parts, targets.split(parts), strict=True)):
        reduce_gradients(model.student.children(), enabled=number == len(parts) - 1)
        losses = model(part, targets=own, whole=coupled and coupled.for_part(number))
        before_backward()
        torch.autograd.backward(losses.objective)
        by_part.append(losses.by_name)
    is_whole = {name for term in (coupled.losses if coupled else ()) for name in term}
    terms = {
        name: loss if name in is_whole else torch.stack([part[name] for part in by_part]).mean()
        for name, loss in by_part[0].items()
    }
    return losses_of(terms, targets=targets)


@dataclass(frozen=True, slots=True, kw_only=True)
class _CoupledAhead:
    """The coupled terms of the whole batch before any part has a graph."""

    losses: tuple[dict[str, Tensor], ...]
    """As in `WholeBatch`."""
    gradients: Sequence[Tensor | None]
    """Of each part, as in `WholeBatch`."""
    states: list[RandomState]
    """Of the random generators before each part's forward pass; empty without coupled terms."""

    def for_part(self, number: int) -> WholeBatch:
        """What a part must know; the next forward pass repeats its dropped paths."""
        if self.states:
            self.states[number].restore()
        return WholeBatch(
            num_parts=len(self.gradients),
            coupled=self.losses,
            cls_gradient=self.gradients[number],
        )


def _coupled_ahead(model: StudentTeacher, parts: Sequence[PretrainBatch]) -> _CoupledAhead:
    terms = [term for term in model.terms if isinstance(term, CoupledTerm)]
    if not terms:
        return _CoupledAhead(losses=(), gradients=[None for _ in parts], states=[])
    device = parts[0].global_crops.device
    states, leaves = [], []
    for part in parts:
        states.append(RandomState.now(device))
        with torch.no_grad():
            leaves.append(model.student_features(part)[0].cls.float())
    halves = [tokens.requires_grad_().chunk(2) for tokens in leaves]
    whole = torch.cat([half[crop] for crop in (0, 1) for half in halves])
    losses = [term.losses(whole) for term in terms]
    weighted = [
        term.weight * loss
        for term, by_name in zip(terms, losses, strict=True)
        for loss in by_name.values()
    ]
    return _CoupledAhead(
        losses=tuple({name: loss.detach() for name, loss in one.items()} for one in losses),
        gradients=torch.autograd.grad(reduce(torch.add, weighted), leaves),
        states=states,
    )
