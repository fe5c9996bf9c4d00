"""TrainingRun: the one loop, from the newest checkpoint to the last step."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from torch.optim import AdamW

from dinov2_core.config import TrainingConfig
from dinov2_core.data.batch import PretrainBatch
from dinov2_core.data.crops import CropRecipe
from dinov2_core.data.loader import PretrainLoader
from dinov2_core.data.masking import MaskRecipe
from dinov2_core.data.shards import ShardReader
from dinov2_core.distributed.checkpoint import (
    Checkpoint,
    load_checkpoint,
    newest_checkpoint,
    save_checkpoint,
)
from dinov2_core.distributed.export import export_weights
from dinov2_core.distributed.mesh import Ranks
from dinov2_core.distributed.sharding import Sharding, shard_averaged, shard_trained
from dinov2_core.training.initialization import build_student_teacher
from dinov2_core.training.parameter_groups import apply_schedule, parameter_groups
from dinov2_core.training.random_state import seed_step
from dinov2_core.training.schedules import schedule_at
from dinov2_core.training.step_report import StepReport, agree_on_numbers
from dinov2_core.training.student_teacher import StudentTeacher
from dinov2_core.training.training_state import (
    settings_identity,
    start_moments,
    training_state,
)

logger = logging.getLogger(__name__)

ADAM_EPSILON = 1e-8


class TrainingRun:
    """Student, teacher and optimizer of one run on this rank, at the step they have reached.

    Every method is collective. A run resumed with the same number of ranks goes on bit for bit
    on the CPU; with another number it sees the same global batches and drops other paths.

    Args:
        config: What is learned.
        ranks: Who trains together.
        checkpoints: Directory of the run's checkpoints, on a file system that all ranks share.
        starting_weights: Exported teacher to start from; ignored when a checkpoint is resumed.

    Raises:
        ValueError: The starting weights do not fit, or the newest checkpoint is of other settings.
    """

    def __init__(
        self,
        config: TrainingConfig,
        *,
        ranks: Ranks,
        checkpoints: Path,
        starting_weights: Path | None = None,
    ) -> None:
        self._config = config
        self._ranks = ranks
        self._checkpoints = checkpoints
        self._identity = settings_identity(config)
        newest = newest_checkpoint(checkpoints)
        if newest is not None and newest.identity != self._identity:
            raise ValueError(
                f"checkpoint {newest.path} was written with other settings; choose another "
                "directory, or the settings it was written with"
            )
        self._model = build_student_teacher(
            config, device=ranks.device, starting_weights=None if newest else starting_weights
        )
        shard_student_teacher(self._model, ranks=ranks)
        self._optimizer = adamw(self._model, config=config)
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
        first: the checkpoint is written when the next report is asked for. The last step writes
        one, and so does a step after which some rank is asked to stop, which ends the iteration.

        Args:
            shards: Directory of the images.
            loader_threads: Threads of this rank that make batches.
            should_stop: Asked once per step.

        Raises:
            ValueError: There are fewer images than a global batch needs.
            NonFiniteLoss: A loss or gradient is not finite; nothing was changed by that step.
        """
        if self.is_finished:
            return
        with (
            ShardReader(shards) as reader,
            self._loader(reader, num_threads=loader_threads) as loader,
        ):
            while not self.is_finished:
                report, must_stop = self._step(loader, should_stop=should_stop)
                self.num_steps_done += 1
                yield report
                if report.writes_checkpoint:
                    self._save()
                if must_stop:
                    return

    def export_teacher(self, path: Path) -> str:
        """Write backbone and heads of the teacher to one file; gives its sha256 on every rank."""
        return export_weights(self._model.teacher, path=path)

    def _step(
        self, loader: PretrainLoader, *, should_stop: Callable[[], bool]
    ) -> tuple[StepReport, bool]:
        """One step of the method; whether it is the last because some rank must stop."""
        step, config = self.num_steps_done, self._config
        started = time.perf_counter()
        batch: PretrainBatch = next(loader).to(self._ranks.device)
        data_seconds = time.perf_counter() - started
        schedule = schedule_at(step, config=config)
        seed_step(config.seed, step=step, rank=self._ranks.rank)
        losses = self._model(batch, teacher_temperature=schedule.teacher_temperature)
        self._optimizer.zero_grad()
        losses.total.backward()
        norms = self._model.clip_gradients(config.optimization.clip_norm)
        numbers = agree_on_numbers(
            losses, norms=norms, must_stop=should_stop(), step=step, ranks=self._ranks
        )
        apply_schedule(self._optimizer, schedule=schedule)
        self._optimizer.step()
        self._model.update_teacher(schedule.teacher_momentum)
        seconds = time.perf_counter() - started
        report = StepReport(
            step=step,
            losses=numbers.losses,
            gradient_norms=numbers.gradient_norms,
            schedule=schedule,
            images_per_second=config.optimization.global_batch_size / seconds,
            seconds=seconds,
            data_seconds=data_seconds,
            writes_checkpoint=numbers.must_stop or self._is_checkpoint_due(step + 1),
        )
        return report, numbers.must_stop

    def _is_checkpoint_due(self, num_steps_done: int) -> bool:
        is_last = num_steps_done == self._config.optimization.num_steps
        return is_last or num_steps_done % self._config.checkpoints.every_steps == 0

    def _loader(self, reader: ShardReader, *, num_threads: int) -> PretrainLoader:
        config, batch = self._config, self._config.optimization.global_batch_size
        if batch > len(reader):
            raise ValueError(
                f"optimization.global_batch_size {batch} is more than the {len(reader)} images of "
                f"the data set; choose at most {len(reader)}"
            )
        side = config.crops.global_crop_size_pixels // config.backbone.patch_size_pixels
        return PretrainLoader(
            reader,
            crops=CropRecipe(**config.crops.model_dump()),
            masks=MaskRecipe(
                grid_height=side,
                grid_width=side,
                probability=config.masking.probability,
                ratio=config.masking.ratio,
            ),
            seed=config.seed,
            global_batch_size=batch,
            rank=self._ranks.rank,
            world_size=self._ranks.world_size,
            start_step=self.num_steps_done,
            num_threads=num_threads,
        )

    def _resume(self, checkpoint: Checkpoint) -> None:
        load_checkpoint(
            training_state(self._model, optimizer=self._optimizer), checkpoint=checkpoint
        )
        if self._ranks.is_main_rank:
            logger.info("resuming %s at step %d", checkpoint.path, checkpoint.step)

    def _save(self) -> None:
        save_checkpoint(
            training_state(self._model, optimizer=self._optimizer),
            directory=self._checkpoints,
            step=self.num_steps_done,
            identity=self._identity,
            keep_last=self._config.checkpoints.keep_last,
        )


def shard_student_teacher(model: StudentTeacher, *, ranks: Ranks) -> None:
    """Split student and teacher over the ranks, in the precision of the settings."""
    sharding = Sharding(precision=model.config.precision)
    student, teacher = model.student, model.teacher
    shard_trained(
        student.children(), blocks=student.backbone.blocks, mesh=ranks.mesh, sharding=sharding
    )
    shard_averaged(
        teacher.children(), blocks=teacher.backbone.blocks, mesh=ranks.mesh, sharding=sharding
    )


def adamw(model: StudentTeacher, *, config: TrainingConfig) -> AdamW:
    """AdamW over the student's parameters, learning rates left to the schedule."""
    optimizer = AdamW(
        parameter_groups(model.student, optimization=config.optimization),
        betas=config.optimization.adam_betas,
        eps=ADAM_EPSILON,
        foreach=True,
    )
    start_moments(optimizer)
    return optimizer
