"""The one description of a backbone, from which its network, files and registered model follow."""

from __future__ import annotations

import json
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from dinov2_core.config.frozen import Frozen
from dinov2_core.errors import InputError


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
    """The vision transformer that student and teacher share; fields are its network's arguments."""

    architecture: ArchitectureName | Dimensions
    """A named size, or dimensions of one's own."""
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

    def network_arguments(self, *, image_size_pixels: int) -> dict[str, Any]:
        """Plain values that `backbones.build_network` takes.

        Args:
            image_size_pixels: Side of the square image that the learned positions belong to.
        """
        return {
            **self.dimensions.model_dump(mode="json"),
            **self.model_dump(mode="json", exclude={"architecture"}),
            "image_size_pixels": image_size_pixels,
        }

    def num_tokens(self, image_size_pixels: int) -> int:
        """Tokens of a square image: cls, registers and patches."""
        return 1 + self.num_register_tokens + (image_size_pixels // self.patch_size_pixels) ** 2


class TeacherConfig(Frozen):
    """What is needed to run exported teacher weights."""

    backbone: Backbone
    """Architecture of the teacher."""
    image_size_pixels: int
    """Resolution whose grid of positions the weights hold."""
    mean: tuple[float, ...]
    """Per channel, subtracted from values in [0, 1]."""
    standard_deviation: tuple[float, ...]
    """Per channel, divides after the mean."""

    def registered_form(self) -> dict[str, dict[str, Any]]:
        """The same as a registered model keeps it, in values that need none of these classes."""
        return {
            "architecture": self.backbone.network_arguments(
                image_size_pixels=self.image_size_pixels
            ),
            "preprocessing": {
                "size_pixels": self.image_size_pixels,
                "mean": list(self.mean),
                "standard_deviation": list(self.standard_deviation),
            },
        }

    @classmethod
    def of_registered(cls, text: bytes, *, source: str) -> Self:
        """The description that a registered model keeps; the inverse of `registered_form`.

        Args:
            text: JSON.
            source: Where it is from, for messages.

        Raises:
            InputError: It describes no teacher.
        """
        try:
            described = json.loads(text)
            architecture, preprocessing = described["architecture"], described["preprocessing"]
            dimensions = {name: architecture.pop(name) for name in Dimensions.model_fields}
            values = {"image_size_pixels": architecture.pop("image_size_pixels"), **preprocessing}
            values["backbone"] = {"architecture": dimensions, **architecture}
            del values["size_pixels"]
            return cls.model_validate_json(json.dumps(values))
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise InputError(
                f"{source} does not describe a teacher ({type(error).__name__}: {error}); name a "
                "model that dinopipe registered"
            ) from error
