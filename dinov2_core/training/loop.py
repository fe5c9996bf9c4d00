"""TrainingRun: the one loop, from the newest checkpoint to the last step."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import torch
from torch import Tensor

from dinov2_core.config.training import TrainingConfig
from dinov2_core.data.batch import PretrainBatch
from dinov2_core.data.crops import CropRecipe
from dinov2_core.data.loader import PretrainLoader
from dinov2_core.data.masking import MaskRecipe
from dinov2_core.data.shards import ShardReader
from dinov2_core.distributed.checkpoint import (
    Checkpoint,
    Retention,
    load_checkpoint,
    newest_checkpoint,
)
from dinov2_core.distributed.checkpoint_writer import CheckpointWriter
from dinov2_core.distributed.export import export_weights
from dinov2_core.distributed.mesh import Ranks
from dinov2_core.distributed.mirror import Mirror
from dinov2_core.training.accumulation import accumulate_gradients
from dinov2_core.training.assembly import adamw, shard_student_teacher
from dinov2_core.training.guard_state import (
    Diagnosis,
    GuardState,
    findings_of,
)
from dinov2_core.training.initialization import build_student_teacher
from dinov2_core.training.parameter_groups import apply_schedule
from dinov2_core.training.random_state import seed_step
from dinov2_core.training.schedules import schedule_at
from dinov2_core.training.starting_weights import load_starting_weights
from dinov2_core.training.step_clock import StepClock
from dinov2_core.training.step_report import StepNumbers, StepReport, agree_on_numbers
from dinov2_core.training.training_state import (
    settings_identity,
    training_state,
)
from dinov2_core.vit.transformer import Features
from dinov2_core.weights.loading import LoadReport

logger = logging.getLogger(__name__)


class TrainingRun:
    """Student, teacher and optimizer of one run on this rank, at the step they have reached.

    Every method is collective. A run resumed with the same number of ranks goes on bit for bit
    on the CPU; with another number it sees the same global batches and drops other paths.

    Args:
        config: What is learned.
        ranks: Who trains together.
        checkpoints: Directory of the run's checkpoints, on a file system that all ranks share.
        mirror: Gets copies of the checkpoints and gives them back, where nodes share no file
            system; None where they do.
        starting_weights: File of a teacher to start from, see `load_starting_weights`; ignored
            when a checkpoint is resumed.

    Raises:
        ValueError: The starting weights do not fit, or the newest checkpoint is of other settings.
    """

    def __init__(
        self,
        config: TrainingConfig,
        *,
        ranks: Ranks,
        checkpoints: Path,
        mirror: Mirror | None = None,
        starting_weights: Path | None = None,
    ) -> None:
        self._config = config
        self._ranks = ranks
        self._checkpoints = checkpoints
        self._mirror = mirror
        self._identity = settings_identity(config)
        newest = newest_checkpoint(checkpoints, mirror=mirror)
        if newest is not None and newest.identity != self._identity:
            raise ValueError(
                f"checkpoint {newest.path} was written with other settings; choose another "
                "directory, or the settings it was written with"
            )
        self._starting_weights = starting_weights
        self.starting_report: LoadReport | None = None
        """What became of every name of the starting weights; None where none were read."""
        self._guards = GuardState(config.guards)
        self._clock = StepClock(ranks.device)
        self._build(None if newest else starting_weights)
        self.first_step = newest.step if newest else 0
        """Step that comes first, counted from 0; more than 0 when a checkpoint was resumed."""
        self.resumed_from = newest.path if newest else None
        """Checkpoint that the run continues."""
        self.num_steps_done = self.first_step
        """Optimizer steps taken, those before a restart included."""
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

        After a report with `writes_checkpoint` the caller may bring its own records to safety
        first: the checkpoint is begun when the next report is asked for, and written while the
        next steps are taken. The last step writes one, and so does a step after which some rank is
        asked to stop, which ends the iteration; the iteration ends when that one is written.

        Args:
            shards: Directory of the images.
            loader_threads: Threads of this rank that make batches.
            should_stop: Asked once per step.

        A step with a loss or gradient that is not finite changes nothing but the counts of
        `config.guards`. After too many in a row the run goes back to its newest checkpoint, or to
        its start, with a lower learning rate: the next report has an earlier step.

        Raises:
            ValueError: There are fewer images than a global batch needs.
            CheckpointNotWritten: Told when the next checkpoint is due, or at the end.
            NonFiniteLoss: Going back did not help either; the weights are those of the last good
                step.
        """
        with ShardReader(shards) as reader, self._checkpoint_writer() as writer:
            must_stop = False
            while not self.is_finished and not must_stop:
                with self._loader(reader, num_threads=loader_threads) as loader:
                    must_stop = yield from self._steps(
                        loader, writer=writer, should_stop=should_stop
                    )
                if self._guards.must_roll_back:
                    self._roll_back(writer)

    def _steps(
        self,
        loader: PretrainLoader,
        *,
        writer: CheckpointWriter,
        should_stop: Callable[[], bool],
    ) -> Generator[StepReport, None, bool]:
        """Steps to the end, to a stop (which is what it returns) or to a return to a checkpoint."""
        while not self.is_finished:
            report, must_stop = self._step(loader, should_stop=should_stop)
            self.num_steps_done += 1
            yield report
            if report.writes_checkpoint:
                writer.save(self._state(), step=self.num_steps_done)
            if must_stop or self._guards.must_roll_back:
                return must_stop
        return False

    def teacher_features(self, images: Tensor) -> Features:
        """What the teacher's backbone says of normalised images [B, C, H, W]. Collective.

        Changes nothing, and may be called between two reports; every rank calls it with images of
        its own and as often as the others.
        """
        with torch.no_grad():
            features: list[Features] = self._model.teacher.backbone([images.to(self._ranks.device)])
        return features[0]

    def export_teacher(self, path: Path) -> str:
        """Write backbone and heads of the teacher to one file; gives its sha256 on every rank."""
        return export_weights(self._model.teacher, path=path)

    def _step(
        self, loader: PretrainLoader, *, should_stop: Callable[[], bool]
    ) -> tuple[StepReport, bool]:
        """One step of the method; whether it is the last because some rank must stop."""
        step, config, clock = self.num_steps_done, self._config, self._clock
        started = time.perf_counter()
        clock.enter("data")
        parts = self._parts(next(loader))
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
        numbers = agree_on_numbers(losses, norms=norms, must_stop=should_stop(), ranks=self._ranks)
        guards = self._guards.count(is_skipped=bool(numbers.non_finite))
        if guards.is_skipped:
            crops = torch.cat([part.global_crops for part in parts])
            self._skip(numbers, centres=centres, crops=crops, loader=loader)
        else:
            apply_schedule(self._optimizer, schedule=schedule)
            self._optimizer.step()
            self._model.update_teacher(
                schedule.teacher_momentum, is_backbone_frozen=schedule.is_backbone_frozen
            )
        phase_seconds = clock.finish(step)
        seconds = time.perf_counter() - started
        report = StepReport(
            step=step,
            losses=numbers.losses,
            gradient_norms=numbers.gradient_norms,
            schedule=schedule,
            images_per_second=config.optimization.global_batch_size / seconds,
            seconds=seconds,
            data_seconds=data_seconds,
            phase_seconds=phase_seconds,
            guards=guards,
            writes_checkpoint=self._is_checkpoint_due(step + 1, must_stop=numbers.must_stop),
        )
        return report, numbers.must_stop

    def _parts(self, batch: PretrainBatch) -> tuple[PretrainBatch, ...]:
        """The batch in the parts it is computed in, on the device."""
        config = self._config
        parts = batch.split(config.optimization.accumulation_steps)
        if config.execution.pads_masked_patches:
            most = self._mask_recipe().most_masked(
                parts[0].masks.shape[0], global_batch_size=config.optimization.global_batch_size
            )
            parts = tuple(part.padded(most) for part in parts)
        return tuple(part.to(self._ranks.device) for part in parts)

    def _skip(
        self,
        numbers: StepNumbers,
        *,
        centres: list[Tensor],
        crops: Tensor,
        loader: PretrainLoader,
    ) -> None:
        """Undo what the step did to the centres, and tell why; raise if there is no way on."""
        for buffer, kept in zip(self._model.buffers(), centres, strict=True):
            buffer.copy_(kept)
        findings, suspects = findings_of(self._model, crops=crops, ranks=self._ranks)
        step = self.num_steps_done
        diagnosis = Diagnosis(
            step=step,
            numbers=numbers.non_finite,
            findings=findings,
            images={rank: loader.image_names(step, rank=rank) for rank in suspects},
        )
        self._guards.refuse_hopeless(diagnosis)
        if self._ranks.is_main_rank:
            logger.warning("skipped: %s", diagnosis)

    def _roll_back(self, writer: CheckpointWriter) -> None:
        """Go on from the newest checkpoint, or from the start, with a lower learning rate.

        The checkpoint is written again with the new count, so that a run that is killed from here
        on resumes with the lower learning rate as well.
        """
        writer.wait()
        record = self._guards.after_rollback()
        newest = newest_checkpoint(self._checkpoints, mirror=self._mirror)
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
                "going back to step %d; the learning rate is %g times the schedule's from there",
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

    def _is_checkpoint_due(self, num_steps_done: int, *, must_stop: bool) -> bool:
        """Whether to write one; never among skipped steps, or going back would lead there."""
        if num_steps_done == self._config.optimization.num_steps:
            return not self._guards.must_roll_back
        is_due = must_stop or num_steps_done % self._config.checkpoints.every_steps == 0
        return is_due and not self._guards.num_consecutive

    def _loader(self, reader: ShardReader, *, num_threads: int) -> PretrainLoader:
        config, batch = self._config, self._config.optimization.global_batch_size
        if batch > len(reader):
            raise ValueError(
                f"optimization.global_batch_size {batch} is more than the {len(reader)} images of "
                f"the data set; choose at most {len(reader)}"
            )
        return PretrainLoader(
            reader,
            crops=CropRecipe(**config.crops.model_dump()),
            masks=self._mask_recipe(),
            seed=config.seed,
            global_batch_size=batch,
            rank=self._ranks.rank,
            world_size=self._ranks.world_size,
            start_step=self.num_steps_done,
            num_threads=num_threads,
        )

    def _mask_recipe(self) -> MaskRecipe:
        config = self._config
        side = config.crops.global_crop_size_pixels // config.backbone.patch_size_pixels
        return MaskRecipe(
            grid_height=side,
            grid_width=side,
            probability=config.masking.probability,
            ratio=config.masking.ratio,
        )

    def _resume(self, checkpoint: Checkpoint) -> None:
        load_checkpoint(self._state(), checkpoint=checkpoint)
        if self._ranks.is_main_rank:
            logger.info("resuming %s at step %d", checkpoint.path, checkpoint.step)

    def _checkpoint_writer(self) -> CheckpointWriter:
        kept = self._config.checkpoints
        writer = CheckpointWriter(
            self._checkpoints,
            identity=self._identity,
            retention=Retention(keep_last=kept.keep_last, keep_every_steps=kept.keep_every_steps),
            mirror=self._mirror,
        )
        writer.prepare(self._state())
        return writer
