"""The report of a step, and its numbers from all ranks."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dinov2_core.distributed.mesh import Ranks
from dinov2_core.training.objective import Losses
from dinov2_core.training.schedules import StepSchedule


@dataclass(frozen=True, slots=True, kw_only=True)
class NonFiniteNumber:
    """A loss or gradient norm that is not a number."""

    name: str
    """A name of `Losses.by_name`, or `gradient norm of` a part of the student."""
    value: float
    """NaN or an infinity."""
    rank: int
    """Rank that has it; norms are those of all ranks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GuardReport:
    """State of the guards after a step."""

    is_skipped: bool
    """This step changed nothing."""
    num_skipped: int
    """Skipped steps of the run."""
    num_rollbacks: int
    """Rollbacks to a checkpoint."""
    learning_rate_factor: float
    """Factor on the scheduled learning rate."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """One step, the same on every rank but for the times."""

    step: int
    """From 0."""
    losses: dict[str, float]
    """Names of `Losses.by_name`, mean over the ranks."""
    gradient_norms: dict[str, float]
    """Before clipping: backbone, dino_head and ibot_head where there is one."""
    schedule: StepSchedule
    """Learning rate, weight decay, teacher momentum and temperature of this step."""
    images_per_second: float
    """Over all ranks, waiting for data included."""
    seconds: float
    """Duration of the step, waiting for data included."""
    data_seconds: float
    """Part of it in which this rank waited for its batch."""
    phase_seconds: dict[str, float]
    """Its phases on this rank, see `StepClock`."""
    guards: GuardReport
    """Whether the step was skipped, and counts so far; a skipped step's numbers may be NaN."""
    writes_checkpoint: bool
    """Whether a checkpoint follows as soon as the caller asks for the next report."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepNumbers:
    """Numbers of all ranks after a step's backward pass."""

    losses: dict[str, float]
    """Mean over the ranks."""
    gradient_norms: dict[str, float]
    """Of the whole gradient."""
    must_stop: bool
    """Some rank was asked to stop."""
    non_finite: tuple[NonFiniteNumber, ...]
    """Those of any rank; with some, the step must change nothing."""


class PendingNumbers:
    """A step's numbers on their way to the host; on CUDA nothing waits for them until `read`.

    Making them is collective: losses and requests to stop are exchanged between the ranks.

    Args:
        losses: Of this rank.
        norms: Gradient norms, already those of all ranks.
        must_stop: Whether this rank was asked to stop.
        ranks: All of them.
    """

    def __init__(
        self, losses: Losses, *, norms: dict[str, Tensor], must_stop: bool, ranks: Ranks
    ) -> None:
        by_name = losses.by_name()
        self._loss_names, self._norm_names = list(by_name), list(norms)
        wish = losses.total.new_full((), float(must_stop))
        row = torch.stack([*(n.float() for n in (*by_name.values(), *norms.values())), wish])
        rows = ranks.gather(row)  # [world_size, n]
        self.is_non_finite: Tensor = rows.isfinite().all().logical_not()
        """Scalar bool on the device, the same on every rank: the step must change nothing."""
        self._rows = rows.to("cpu", non_blocking=True)  # pinned memory
        self._copied: torch.cuda.Event | None = None
        if rows.is_cuda:
            self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._copied.record()

    def read(self) -> StepNumbers:
        """The numbers; waits until the device has computed and copied them."""
        if self._copied is not None:
            self._copied.synchronize()
        rows: list[list[float]] = self._rows.tolist()
        names = [*self._loss_names, *(f"gradient norm of {name}" for name in self._norm_names)]
        means = [sum(values) / len(rows) for values in zip(*rows, strict=True)]
        return StepNumbers(
            losses=dict(zip(self._loss_names, means, strict=False)),
            gradient_norms=dict(
                zip(self._norm_names, means[len(self._loss_names) :], strict=False)
            ),
            must_stop=any(values[-1] > 0 for values in rows),
            non_finite=tuple(
                NonFiniteNumber(name=name, value=value, rank=rank)
                for rank, values in enumerate(rows)
                for name, value in zip(names, values, strict=False)
                if not math.isfinite(value)
            ),
        )
