"""Gradients of a batch that is computed in parts, equal to those of the whole batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from dinov2_core.data.batch import PretrainBatch
from dinov2_core.distributed.sharding import reduce_gradients
from dinov2_core.training.random_state import RandomState
from dinov2_core.training.student_teacher import Losses, StudentTeacher, Terms, losses_of


def accumulate_gradients(
    model: StudentTeacher,
    parts: Sequence[PretrainBatch],
    *,
    teacher_temperature: float,
    before_backward: Callable[[], None] = lambda: None,
) -> Losses:
    """Losses of the whole batch; its gradients are added to those of the student. Collective.

    Targets are assigned once over the whole batch: the teacher runs part by part and only its
    head outputs stay. KoLeo couples the images, so that its gradient with respect to the cls
    tokens of all parts is computed first, from forward passes without a graph, and injected into
    the backward pass of each part (the two passes of GradCache, arXiv:2101.06983). The second
    pass drops the same paths as the first.

    Several parts cost one more forward pass of the student than the undivided batch, none without
    KoLeo, and whole instead of sharded gradients on every rank until the last part.

    Args:
        model: Student, teacher and objective.
        parts: Equal parts of this rank's images, from `PretrainBatch.split`.
        teacher_temperature: Divides the teacher's scores; > 0, no unit.
        before_backward: Called before every backward pass.

    Returns:
        Losses of the whole batch; with several parts, all without a graph.
    """
    if len(parts) == 1:
        losses: Losses = model(parts[0], teacher_temperature=teacher_temperature)
        before_backward()
        torch.autograd.backward(losses.total)
        return losses
    targets = model.teacher_targets(parts, temperature=teacher_temperature)
    koleo = _koleo_ahead(model, parts)
    terms = []
    for number, (part, own) in enumerate(zip(parts, targets.split(parts), strict=True)):
        reduce_gradients(model.student.children(), enabled=number == len(parts) - 1)
        if koleo.states:
            koleo.states[number].restore()
        inject = _injection(koleo.gradients[number])
        part_terms = model.student_terms(part, targets=own, koleo=inject)
        means = part_terms.dino_local + part_terms.dino_global + part_terms.ibot
        before_backward()
        torch.autograd.backward(means / len(parts) + part_terms.koleo)
        terms.append(part_terms)
    return losses_of(_whole(terms, koleo=koleo.term), targets=targets)


@dataclass(frozen=True, slots=True, kw_only=True)
class _KoleoAhead:
    """KoLeo of the whole batch before any part has a graph."""

    term: Tensor
    """Weighted, scalar float32."""
    gradients: list[Tensor]
    """Per part, with respect to the cls tokens [2B, D], float32."""
    states: list[RandomState]
    """Per part, where the random generators stood before its forward pass; none without KoLeo."""


def _koleo_ahead(model: StudentTeacher, parts: Sequence[PretrainBatch]) -> _KoleoAhead:
    device = parts[0].global_crops.device
    if model.config.koleo is None:
        nothing = torch.zeros((), device=device)
        return _KoleoAhead(term=nothing, gradients=[nothing for _ in parts], states=[])
    states, cls = [], []
    for part in parts:
        states.append(RandomState.now(device))
        with torch.no_grad():
            cls.append(model.student_features(part)[0].cls.float())
    leaves = [tokens.requires_grad_() for tokens in cls]
    halves = [tokens.chunk(2) for tokens in leaves]
    whole = torch.cat([half[crop] for crop in (0, 1) for half in halves])
    term = model.koleo_term(whole)
    gradients = list(torch.autograd.grad(term, leaves))
    return _KoleoAhead(term=term.detach(), gradients=gradients, states=states)


def _injection(gradient: Tensor) -> Callable[[Tensor], Tensor]:
    """A term whose gradient with respect to the cls tokens is the given one."""
    return lambda cls: (cls.float() * gradient).sum()


def _whole(terms: Sequence[Terms], *, koleo: Tensor) -> Terms:
    """Terms of the whole batch: the parts have equally many images."""
    means = {
        field.name: torch.stack([getattr(part, field.name).detach() for part in terms]).mean()
        for field in fields(Terms)
    }
    return Terms(**means | {"koleo": koleo})
