"""Learning settings: what is learned, from which crops, with which objective and schedule."""

from __future__ import annotations

import math
from typing import Self

from pydantic import Field, model_validator

from dinov2_core.config.augmentation import Crops, Masking
from dinov2_core.config.backbone import Backbone
from dinov2_core.config.execution import Checkpoints, Execution, Precision
from dinov2_core.config.frozen import Frozen
from dinov2_core.config.guards import Guards
from dinov2_core.config.objectives import Objectives


class Teacher(Frozen):
    """Schedules of the exponential moving average and of its softmax."""

    momentum: float = Field(0.992, ge=0, le=1)
    """EMA momentum at the first step."""
    final_momentum: float = Field(1.0, ge=0, le=1)
    """EMA momentum at the last step (cosine in between)."""
    warmup_temperature: float = Field(0.04, gt=0)
    """Softmax temperature at the first step."""
    temperature: float = Field(0.07, gt=0)
    """Softmax temperature after the warm-up (linear in between)."""
    temperature_warmup_steps: int = Field(37_500, ge=0)
    """Length of the temperature's warm-up; 30 epochs of 1250 steps in the reference."""


class Optimization(Frozen):
    """AdamW, its schedules and the batch."""

    num_steps: int = Field(125_000, ge=1)
    """Optimizer steps of the whole run."""
    warmup_steps: int = Field(12_500, ge=0)
    """Steps of the learning rate's linear warm-up."""
    global_batch_size: int = Field(2048, ge=1)
    """Images per optimizer step over all ranks."""
    accumulation_steps: int = Field(1, ge=1)
    """Parts that a rank's share of the batch is computed in, one after the other."""
    base_learning_rate: float = Field(0.004, gt=0)
    """Learning rate at a global batch of 1024 images; scaled by the square root of the batch."""
    final_learning_rate: float = Field(1e-6, ge=0)
    """Learning rate at the last step (cosine after the warm-up)."""
    weight_decay: float = Field(0.04, ge=0)
    """Weight decay at the first step."""
    final_weight_decay: float = Field(0.4, ge=0)
    """Weight decay at the last step (cosine)."""
    adam_betas: tuple[float, float] = (0.9, 0.999)
    """Decay of AdamW's first and second moments."""
    clip_norm: float = Field(3.0, gt=0)
    """Largest gradient norm of backbone and of each head, separately."""
    freeze_prototypes_steps: int = Field(1250, ge=0)
    """Steps at the start in which the prototype layer does not move."""
    layerwise_decay: float = Field(0.9, gt=0, le=1)
    """Factor on the learning rate per block from the top down."""
    patch_embed_factor: float = Field(0.2, gt=0)
    """Further factor on the learning rate of the patch embedding."""

    @property
    def peak_learning_rate(self) -> float:
        """base_learning_rate scaled to the global batch by the square-root rule."""
        return self.base_learning_rate * math.sqrt(self.global_batch_size / 1024)

    @model_validator(mode="after")
    def _warmup_fits(self) -> Self:
        if self.warmup_steps > self.num_steps:
            raise ValueError(
                f"warmup_steps {self.warmup_steps} is more than num_steps {self.num_steps}; "
                f"choose at most {self.num_steps}"
            )
        return self


class HeadWarmup(Frozen):
    """Steps at the start in which heads learn on a backbone that does not move.

    For starting weights without heads: gradients of random heads would spoil the backbone. Every
    schedule runs on, so that the backbone joins at the learning rate of that step.
    """

    num_steps: int = Field(ge=1)
    """Length of the warm-up; longer than optimization.freeze_prototypes_steps."""


class BackboneAndCrops(Frozen):
    """The first settings of a training: its random numbers, its networks and what they see."""

    seed: int = Field(0, ge=0)
    """Of weights, order, crops, masks and dropped paths."""
    backbone: Backbone
    """Vision transformer of student and teacher."""
    crops: Crops = Crops()
    """Augmentation."""
    masking: Masking = Masking()
    """Masks of the student's global crops."""


class TrainingConfig(Objectives, BackboneAndCrops):  # keys in the order of bases from right to left
    """One pretraining or high-resolution run: everything that may change its result."""

    teacher: Teacher = Teacher()
    """Schedules of the teacher."""
    optimization: Optimization = Optimization()
    """Batch, learning rate, weight decay."""
    head_warmup: HeadWarmup | None = None
    """Freezes the backbone first; needed when the starting weights have no heads."""
    precision: Precision = "bf16"
    """Compute type of backbone and heads; master weights, losses and Sinkhorn stay fp32."""
    execution: Execution = Execution()
    """No part of the run's identity, as checkpoints and guards."""
    checkpoints: Checkpoints = Checkpoints()
    """When the state is written and what stays."""
    guards: Guards = Guards()
    """What happens when the run goes wrong."""

    @property
    def grid_side(self) -> int:
        """Patches along a side of a global crop."""
        return self.crops.global_crop_size_pixels // self.backbone.patch_size_pixels

    @model_validator(mode="after")
    def _crops_divide(self) -> Self:
        patch = self.backbone.patch_size_pixels
        for name in ("global_crop_size_pixels", "local_crop_size_pixels"):
            size: int = getattr(self.crops, name)
            if size % patch:
                down, up = size // patch * patch, (size // patch + 1) * patch
                nearest = f"{down} or {up}" if down else f"{up}"
                raise ValueError(
                    f"crops.{name} {size} is not divisible by backbone.patch_size_pixels {patch}; "
                    f"choose {nearest}, or another patch size"
                )
        if len(self.crops.mean) != self.backbone.num_channels:
            raise ValueError(
                f"crops.mean has {len(self.crops.mean)} values but backbone.num_channels is "
                f"{self.backbone.num_channels}; give one mean and one deviation per channel"
            )
        return self

    @model_validator(mode="after")
    def _head_warmup_fits(self) -> Self:
        if self.head_warmup is None:
            return self
        steps, optimization = self.head_warmup.num_steps, self.optimization
        frozen, last = optimization.freeze_prototypes_steps, optimization.num_steps
        if not frozen < steps < last:
            raise ValueError(
                f"head_warmup.num_steps {steps} is not between {frozen} and {last}; choose more "
                "than optimization.freeze_prototypes_steps, less than optimization.num_steps"
            )
        return self

    def at_high_resolution(self, phase: HighResolution) -> TrainingConfig:
        """The same objective for fewer steps on larger crops, every schedule compressed.

        arXiv:2304.07193 B.2: same procedure and hyper-parameters, schedules compressed into the
        phase's steps, a lower base learning rate. Heads come with the teacher: no head warm-up.
        """
        old = self.optimization
        ratio = phase.num_steps / old.num_steps

        def compressed(steps: int) -> int:
            return round(steps * ratio)

        optimization = old.model_copy(
            update={
                "num_steps": phase.num_steps,
                "warmup_steps": compressed(old.warmup_steps),
                "freeze_prototypes_steps": compressed(old.freeze_prototypes_steps),
                "base_learning_rate": old.base_learning_rate * phase.learning_rate_factor,
                "global_batch_size": phase.global_batch_size,
            }
        )
        teacher = self.teacher.model_copy(
            update={"temperature_warmup_steps": compressed(self.teacher.temperature_warmup_steps)}
        )
        crops = self.crops.model_copy(
            update={
                "global_crop_size_pixels": phase.global_crop_size_pixels,
                "local_crop_size_pixels": phase.local_crop_size_pixels,
            }
        )
        changed = self.model_copy(
            update={
                "optimization": optimization,
                "head_warmup": None,
                "teacher": teacher,
                "crops": crops,
                "checkpoints": self.checkpoints.compressed(ratio),
            }
        )
        return TrainingConfig.model_validate_json(changed.model_dump_json())


class HighResolution(Frozen):
    """The last phase: few steps at a larger crop, from the pretrained teacher."""

    num_steps: int = Field(10_000, ge=1)
    """Optimizer steps; every schedule of the pretraining is compressed into them."""
    global_crop_size_pixels: int = Field(518, ge=8)
    """Side of the two global crops."""
    local_crop_size_pixels: int = Field(98, ge=4)
    """Side of the local crops."""
    global_batch_size: int = Field(2048, ge=1)
    """Images per optimizer step over all ranks."""
    learning_rate_factor: float = Field(0.1, gt=0)
    """Factor on pretraining's base learning rate; the paper lowers it without giving the value."""
