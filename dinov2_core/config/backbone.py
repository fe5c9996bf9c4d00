"""Settings of the vision transformer."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from dinov2_core.config.frozen import Frozen


class Dimensions(Frozen):
    """Size of a vision transformer of one's own."""

    embed_dim: int = Field(ge=16)
    """Width D of every token."""
    depth: int = Field(ge=1)
    """Number of blocks."""
    num_heads: int = Field(ge=1)
    """Attention heads; divides embed_dim."""
    mlp_ratio: float = Field(4.0, gt=0)
    """Hidden width of the feed-forward part, as a multiple of embed_dim."""

    @model_validator(mode="after")
    def _heads_divide_width(self) -> Self:
        if self.embed_dim % self.num_heads:
            raise ValueError(
                f"embed_dim {self.embed_dim} is not divisible by num_heads {self.num_heads}; "
                f"choose a number of heads that divides {self.embed_dim}"
            )
        return self


ArchitectureName = Literal["vit_tiny", "vit_small", "vit_base", "vit_large", "vit_giant2"]

ARCHITECTURES: dict[ArchitectureName, Dimensions] = {
    "vit_tiny": Dimensions(embed_dim=192, depth=12, num_heads=3),
    "vit_small": Dimensions(embed_dim=384, depth=12, num_heads=6),
    "vit_base": Dimensions(embed_dim=768, depth=12, num_heads=12),
    "vit_large": Dimensions(embed_dim=1024, depth=24, num_heads=16),
    "vit_giant2": Dimensions(embed_dim=1536, depth=40, num_heads=24),
}
"""Named sizes; the last four are those of arXiv:2304.07193, table 17."""


class Backbone(Frozen):
    """The vision transformer that student and teacher share."""

    architecture: ArchitectureName | Dimensions
    """A name (vit_tiny, vit_small, vit_base, vit_large, vit_giant2) or dimensions of one's own."""
    patch_size_pixels: int = Field(14, ge=1)
    """Side of a square patch. DINOv2 releases use 14."""
    num_channels: Literal[1, 3] = 3
    """Channels of the images: gray or colours."""
    feed_forward: Literal["mlp", "swiglu"] = "mlp"
    """Feed-forward part of a block; vit_giant2 and the long recipes use swiglu."""
    num_register_tokens: int = Field(0, ge=0)
    """Register tokens without position, arXiv:2309.16588 uses 4."""
    layer_scale: float = Field(1e-5, gt=0)
    """Initial value of LayerScale."""
    drop_path_rate: float = Field(0.3, ge=0, lt=1)
    """Share of samples that a residual branch skips in training, the same in every block."""
    position_offset: float = Field(0.0, ge=0)
    """Offset added to the grid when positions are resampled by scale factor; 0 resamples by size.
    The first DINOv2 release used 0.1, the one with registers 0."""
    position_antialias: bool = True
    """Low-pass filter positions when resampling; timm and the registers release do."""

    @property
    def dimensions(self) -> Dimensions:
        """Width, depth and heads that the architecture stands for."""
        if isinstance(self.architecture, Dimensions):
            return self.architecture
        return ARCHITECTURES[self.architecture]
