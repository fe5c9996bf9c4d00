"""TrainingRun: the one loop, from the newest checkpoint to the last step."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dinov2_core.config.training import TrainingConfig
from dinov2_core.data.loader import PretrainLoader
from dinov2_core.data.shards import ShardReader
from dinov2_core.distributed.checkpoint import (
    Checkpoint,
    load_checkpoint,
    newest_checkpoint,
)
from dinov2_core.distributed.checkpoint_writer import CheckpointWriter
from dinov2_core.distributed.export import export_weights
from dinov2_core.distributed.mesh import Ranks
from dinov2_core.distributed.remote_checkpoints import RemoteCheckpoints, newest_on_all_nodes
from dinov2_core.errors import SettingsError
from dinov2_core.training.accumulation import accumulate_gradients
from dinov2_core.training.assembly import adamw, shard_student_teacher
from dinov2_core.training.batches import parts_of, pretrain_loader
from dinov2_core.training.guard_state import GuardState, diagnose
from dinov2_core.training.initialization import build_student_teacher
from dinov2_core.training.random_state import seed_step
from dinov2_core.training.schedules import StepSchedule, schedule_at
from dinov2_core.training.starting_weights import load_starting_weights
from dinov2_core.training.step_clock import StepClock, StepTimes
from dinov2_core.training.step_report import PendingNumbers, StepNumbers, StepReport
from dinov2_core.training.training_state import settings_identity, training_state
from dinov2_core.training.update import update_or_skip
from dinov2_core.vit.transformer import Features
from dinov2_core.weights.loading import LoadReport

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class _TakenStep:
    """A step whose work is issued; its numbers may still be on the device."""

    step: int
    schedule: StepSchedule
    numbers: PendingNumbers
    times: StepTimes
    data_seconds: float
    global_crops: list[Tensor]
    """Of each part, for the diagnosis of a skipped step."""


class TrainingRun:
    """Student, teacher and optimizer of one run on this rank, at the step they have reached.

    Every method is collective. A run resumed with the same number of ranks continues bit for
    bit on the CPU; with another number it sees the same global batches and drops other paths.

    On CUDA the host never waits for the numbers of the step that it has just issued: the device
    decides whether to skip it, and the host reads its numbers, reports, and learns of a request to
    stop or of the need to go back, when the next step is issued. Before a checkpoint it waits.

    Args:
        config: What is learned.
        ranks: This rank among all that train together.
        checkpoints: Directory of the run's checkpoints, on a file system that all ranks share.
        remote: Store with copies of the checkpoints, where nodes share no file system; None where
            they do.
        starting_weights: File of a teacher to start from, see `load_starting_weights`; ignored
            when a checkpoint is resumed.

    Raises:
        SettingsError: The newest checkpoint was written with other settings.
        InputError: The starting weights do not fit.
        CheckpointError: The store of the checkpoints cannot be read.
    """

    def __init__(
        self,
        config: TrainingConfig,
        *,
        ranks: Ranks,
        checkpoints: Path,
        remote: RemoteCheckpoints | None = None,
        starting_weights: Path | None = None,
    ) -> None:
        self._config = config
        self._ranks = ranks
        self._checkpoints = checkpoints
        self._remote = remote
        self._identity = settings_identity(config)
        newest = self._newest_checkpoint()
        if newest is not None and newest.identity != self._identity:
            raise SettingsError(
                f"checkpoint {newest.path} was written with other settings; choose another "
                "directory, or the settings it was written with"
            )
        self._starting_weights = starting_weights
        self.starting_report: LoadReport | None = None
        """How every name of the starting weights was loaded; None where none were read."""
        self._guards = GuardState(config.guards)
        self._clock = StepClock(ranks.device)
        self._num_unread = 1 if ranks.device.type == "cuda" else 0
        """Steps whose numbers stay on the device while the next one is issued."""
        self._build(None if newest else starting_weights)
        self.first_step = newest.step if newest else 0
        """Step that comes first, counted from 0; more than 0 when a checkpoint was resumed."""
        self.num_steps_done = self.first_step
        """Optimizer steps issued, those before a restart included."""
        if newest is not None:
            self._resume(newest)

    @property
    def is_finished(self) -> bool:
        """Whether every step was taken."""
        return self.num_steps_done >= self._config.optimization.num_steps

    def steps(
        self,
        *,
        shards: Path,
        loader_threads: int,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> Iterator[StepReport]:
        """Take the remaining steps and report each.

        After a report with `writes_checkpoint` the caller may save its own records first: the
        checkpoint is begun when the next report is asked for, and written while the next steps
        are taken. The last step writes one, and so does a step after which some rank is asked to
        stop, which ends the iteration when that checkpoint is written.

        A step with a loss or gradient that is not finite changes nothing but the counts of
        `config.guards`. After too many in a row the run rolls back to its newest checkpoint, or
        to its start, with a lower learning rate: the next report has an earlier step.

        Args:
            shards: Directory of the images.
            loader_threads: Threads of this rank that make batches.
            should_stop: Asked once per step.

        Raises:
            SettingsError: There are fewer images than a global batch needs.
            CheckpointError: A checkpoint could not be written; raised when the next one is due,
                or at the end.
            NonFiniteLoss: No rollback is left; the last checkpoint is complete.
        """
        with ShardReader(shards) as reader, self._checkpoint_writer() as writer:
            must_stop = False
            while not self.is_finished and not must_stop:
                unread: deque[_TakenStep] = deque()
                with self._loader(reader, num_threads=loader_threads) as loader:
                    while not (self.is_finished or must_stop or self._guards.must_roll_back):
                        started = time.perf_counter()
                        unread.append(self._step(loader, should_stop=should_stop))
                        self.num_steps_done += 1
                        while self._must_read(unread, must_stop=must_stop):
                            report, must_stop = self._report(
                                unread, loader=loader, started=started, must_stop=must_stop
                            )
                            yield report
                            started = time.perf_counter()
                            if report.writes_checkpoint:
                                writer.save(self._state(), step=self.num_steps_done)
                if self._guards.must_roll_back:
                    self._roll_back(writer)

    def teacher_features(self, images: Tensor) -> Features:
        """Features of the teacher's backbone for normalised images [B, C, H, W]. Collective.

        Changes nothing, and may be called between two reports; every rank calls it with images of
        its own and as often as the others. On CUDA the teacher is one step ahead of the report,
        unless that one writes a checkpoint.
        """
        with torch.no_grad():
            features: list[Features] = self._model.teacher.backbone([images.to(self._ranks.device)])
        return features[0]

    def export_teacher(self, path: Path) -> str:
        """Write backbone and heads of the teacher to one file; gives its sha256 on every rank."""
        return export_weights(self._model.teacher, path=path)

    def _step(self, loader: PretrainLoader, *, should_stop: Callable[[], bool]) -> _TakenStep:
        """One step of the method."""
        step, config, clock = self.num_steps_done, self._config, self._clock
        started = time.perf_counter()
        clock.enter("data")
        parts = [p.to(self._ranks.device) for p in parts_of(next(loader), config=config)]
        data_seconds = time.perf_counter() - started
        schedule = self._guards.lowered(schedule_at(step, config=config))
        seed_step(config.seed, step=step, rank=self._ranks.rank)
        centres = [buffer.clone() for buffer in self._model.buffers()]
        self._optimizer.zero_grad()
        losses = accumulate_gradients(
            self._model,
            parts,
            teacher_temperature=schedule.teacher_temperature,
            before_backward=lambda: clock.enter("backward"),
        )
        clock.enter("optimizer")
        norms = self._model.clip_gradients(config.optimization.clip_norm)
        numbers = PendingNumbers(losses, norms=norms, must_stop=should_stop(), ranks=self._ranks)
        is_skipped = numbers.is_non_finite
        update_or_skip(
            self._model,
            self._optimizer,
            schedule=schedule,
            centres=centres,
            is_skipped=is_skipped if self._num_unread else bool(is_skipped),
        )
        return _TakenStep(
            step=step,
            schedule=schedule,
            numbers=numbers,
            times=clock.finish(),
            data_seconds=data_seconds,
            global_crops=[part.global_crops for part in parts],
        )

    def _must_read(self, unread: deque[_TakenStep], *, must_stop: bool) -> bool:
        """Whether the oldest step must be read before the next one is issued."""
        if not unread or self._guards.must_roll_back:
            return False
        return must_stop or self._is_checkpoint_step or len(unread) > self._num_unread

    def _report(
        self,
        unread: deque[_TakenStep],
        *,
        loader: PretrainLoader,
        started: float,
        must_stop: bool,
    ) -> tuple[StepReport, bool]:
        """Report of the oldest step and whether to stop; raises if the run cannot continue."""
        taken = unread.popleft()
        numbers, phase_seconds = taken.numbers.read(), taken.times.seconds()
        seconds = time.perf_counter() - started
        must_stop = must_stop or numbers.must_stop
        guards = self._guards.count(is_skipped=bool(numbers.non_finite))
        if guards.is_skipped:
            self._diagnose(taken, numbers, loader=loader)
        report = StepReport(
            step=taken.step,
            losses=numbers.losses,
            gradient_norms=numbers.gradient_norms,
            schedule=taken.schedule,
            images_per_second=self._config.optimization.global_batch_size / seconds,
            seconds=seconds,
            data_seconds=taken.data_seconds,
            phase_seconds=phase_seconds,
            guards=guards,
            writes_checkpoint=not unread and self._is_checkpoint_due(must_stop=must_stop),
        )
        return report, must_stop

    def _diagnose(self, taken: _TakenStep, numbers: StepNumbers, *, loader: PretrainLoader) -> None:
        """Log why a step was skipped; raise if no rollback is left."""
        diagnosis = diagnose(
            self._model,
            step=taken.step,
            numbers=numbers.non_finite,
            crops=torch.cat(taken.global_crops),
            names_of=lambda rank: loader.image_names(taken.step, rank=rank),
            ranks=self._ranks,
        )
        if self._guards.must_roll_back:
            self.num_steps_done = taken.step
        self._guards.raise_if_exhausted(diagnosis)
        if self._ranks.is_main_rank:
            logger.warning("skipped: %s", diagnosis)

    def _roll_back(self, writer: CheckpointWriter) -> None:
        """Continue from the newest checkpoint, or from the start, with a lower learning rate.

        The checkpoint is written again with the new count, so that a run that is killed from here
        on resumes with the lower learning rate as well.
        """
        writer.wait()
        record = self._guards.after_rollback()
        newest = self._newest_checkpoint()
        if newest is None:
            del self._model, self._optimizer  # never two of each in memory
            self._build(self._starting_weights)
        else:
            self._resume(newest)
        self.num_steps_done = newest.step if newest else 0
        self._guards.record.copy_(record)
        self._guards.num_consecutive = 0
        if self._ranks.is_main_rank:
            logger.warning(
                "rolling back to step %d; the learning rate is %g times the schedule's from there",
                self.num_steps_done,
                self._guards.learning_rate_factor,
            )
        writer.save(self._state(), step=self.num_steps_done)

    def _build(self, starting_weights: Path | None) -> None:
        """Make student, teacher and optimizer as at the start of a run."""
        self._model = build_student_teacher(self._config, device=self._ranks.device)
        if starting_weights is not None:
            self.starting_report = load_starting_weights(self._model, path=starting_weights)
        shard_student_teacher(self._model, ranks=self._ranks)
        self._clock.watch(self._model)
        self._optimizer = adamw(self._model, config=self._config)

    def _state(self) -> dict[str, Tensor]:
        """Everything that a checkpoint holds."""
        state = training_state(self._model, optimizer=self._optimizer)
        return state | {"guards": self._guards.record}

    @property
    def _is_checkpoint_step(self) -> bool:
        """Whether a checkpoint is planned after the steps so far."""
        return self.is_finished or self.num_steps_done % self._config.checkpoints.every_steps == 0

    def _is_checkpoint_due(self, *, must_stop: bool) -> bool:
        """Whether to write one; never among skipped steps, or a rollback would lead there."""
        if self.is_finished:
            return not self._guards.must_roll_back
        return (must_stop or self._is_checkpoint_step) and not self._guards.num_consecutive

    def _loader(self, reader: ShardReader, *, num_threads: int) -> PretrainLoader:
        return pretrain_loader(
            reader,
            config=self._config,
            ranks=self._ranks,
            start_step=self.num_steps_done,
            num_threads=num_threads,
        )

    def _newest_checkpoint(self) -> Checkpoint | None:
        if self._remote is None:
            return newest_checkpoint(self._checkpoints)
        return newest_on_all_nodes(self._checkpoints, remote=self._remote)

    def _resume(self, checkpoint: Checkpoint) -> None:
        load_checkpoint(self._state(), checkpoint=checkpoint)
        if self._ranks.is_main_rank:
            logger.info("resuming %s at step %d", checkpoint.path, checkpoint.step)

    def _checkpoint_writer(self) -> CheckpointWriter:
        writer = CheckpointWriter(
            self._checkpoints,
            identity=self._identity,
            retention=self._config.checkpoints,
            remote=self._remote,
        )
        writer.prepare(self._state())
        return writer
