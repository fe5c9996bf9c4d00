"""Settings of memory, speed and checkpoints, on which results depend by rounding at most."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from dinov2_core.config.frozen import Frozen

Precision = Literal["fp32", "bf16"]
Recomputation = Literal["none", "selective", "full"]


class Execution(Frozen):
    """Memory against time; a run may be continued with other values."""

    recomputes_activations: Recomputation = "none"
    """What the student's blocks compute again in the backward pass instead of keeping it:
    everything but the results of matrix products and attention (selective), or everything (full).
    """
    compiles_blocks: bool = False
    """Compile the blocks with torch.compile; rounds differently, needs a C++ compiler on CPUs."""
    attention_kernel: Literal["fastest", "varlen", "xformers", "flex", "per_group"] = "fastest"
    """How attention is computed: in one launch over all crops by torch's variable-length flash
    kernel (varlen), by xformers under a block-diagonal mask (extra `gpu`) or by torch's flex
    attention, all three on CUDA in bf16; or crop group by crop group, everywhere. fastest takes
    the first of varlen, xformers and per_group that runs on the device."""
    pads_masked_patches: bool = False
    """Fill the masked patches of a rank up to the most there can be, so that no shape changes from
    step to step. Costs head computations: about 6 % on one rank, up to 3 times on many."""


class Checkpoints(Frozen):
    """When the resumable state is written and how much of it stays."""

    every_steps: int = Field(3750, ge=1)
    """Steps between two checkpoints; the last step always writes one."""
    keep_last: int = Field(3, ge=1)
    """Newest checkpoints that stay on disk."""
    keep_every_steps: int | None = Field(None, ge=1)
    """Checkpoints at multiples of so many steps stay for good; none do when null."""

    @model_validator(mode="after")
    def _kept_ones_are_written(self) -> Self:
        if self.keep_every_steps is not None and self.keep_every_steps % self.every_steps:
            raise ValueError(
                f"keep_every_steps {self.keep_every_steps} is no multiple of every_steps "
                f"{self.every_steps}, so that some would not be written; choose a multiple"
            )
        return self

    def compressed(self, ratio: float) -> Checkpoints:
        """The same number of checkpoints in a run whose length is multiplied by a ratio."""
        every = max(1, round(self.every_steps * ratio))
        kept = self.keep_every_steps
        return Checkpoints(
            every_steps=every,
            keep_last=self.keep_last,
            keep_every_steps=None if kept is None else kept // self.every_steps * every,
        )
