"""Guards: when a run skips a step, rolls back, warns or stops."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from dinov2_core.config.frozen import Frozen


class CollapseWatch(Frozen):
    """Warnings of features that collapse onto few directions or few prototypes.

    The defaults are far below what healthy runs show (dozens of directions, entropies of some
    nats), so that a warning means something.
    """

    every_steps: int = Field(100, ge=1)
    """Steps between two measurements of the teacher's cls tokens of fixed images."""
    num_images: int = Field(128, ge=2)
    """Fixed images; the effective rank is at most this number."""
    grace_steps: int = Field(2000, ge=0)
    """Steps at the start without warnings: an untrained backbone gives all images nearly the same
    features, of effective rank 1."""
    min_effective_rank: float = Field(2.0, ge=0)
    """Least effective rank (RankMe, arXiv:2210.02885) of those cls tokens; 1 is full collapse."""
    min_teacher_entropy_nats: float = Field(0.01, ge=0)
    """Least mean entropy of the teacher's targets; 0 nats is one-hot for every image."""
    max_teacher_entropy_share: float = Field(0.999, gt=0, le=1)
    """Largest mean entropy as a share of log K; 1 is the uniform target for every image."""
    min_prototype_usage: float = Field(0.01, ge=0, le=1)
    """Least share of distinct best prototypes among a rank's cls tokens; one token in M global
    crops is 1 / M, so that small batches need a larger value."""
    action: Literal["warn", "stop"] = "warn"
    """What a crossed threshold does."""


class Guards(Frozen):
    """What happens when a run goes wrong.

    No part of a run's identity: a stopped run continues under other guards from its checkpoint.
    """

    max_consecutive_skips: int = Field(10, ge=0)
    """Steps in a row with a non-finite loss or gradient that are skipped (no update of student,
    teacher or centres); one more rolls back to the last checkpoint. A single bad batch costs one
    step, bad weights or a diverging run never recover by skipping."""
    max_rollbacks: int = Field(2, ge=0)
    """Rollbacks to a checkpoint before the run stops with a diagnosis."""
    rollback_learning_rate_factor: float = Field(0.5, gt=0, le=1)
    """Factor on the learning rate of all further steps, once more for every rollback; halving
    is what the authors advise users whose runs diverge."""
    collapse: CollapseWatch = CollapseWatch()
    """Warnings of collapse."""
