"""VisionTransformer: packed multi-crop forward to Features(cls, registers, patches)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dinov2_core.vit.block import NORM_EPSILON, Block, LayerScale
from dinov2_core.vit.feed_forward import FeedForward
from dinov2_core.vit.packing import CropGroup, split_rows
from dinov2_core.vit.patch_embed import PatchEmbed
from dinov2_core.vit.position import resample_positions


@dataclass(frozen=True, slots=True, kw_only=True)
class Features:
    """Tokens of B crops of one size after the final norm."""

    cls: Tensor
    """[B, D] the whole crop."""
    registers: Tensor
    """[B, R, D] register tokens, R may be 0."""
    patches: Tensor
    """[B, N, D] patches, row by row."""


class VisionTransformer(nn.Module):
    """Vision transformer of DINOv2, arXiv:2304.07193, with optional registers, arXiv:2309.16588.

    Parameters have the reference's names. In training mode, stochastic depth computes each
    residual branch for a random subset of the crops of every group, one group or more alike.

    Args:
        image_size_pixels: Side of the square image that the learned positions belong to.
        patch_size_pixels: Side of a square patch.
        num_channels: Channels of the images.
        embed_dim: Width D of every token.
        depth: Number of blocks.
        num_heads: Attention heads, divides embed_dim.
        mlp_ratio: Hidden width of the feed-forward part, as a multiple of embed_dim.
        feed_forward: Feed-forward part of the blocks.
        num_register_tokens: Register tokens R without position.
        drop_path_rate: Share of crops that a residual branch skips in training, in [0, 1).
        layer_scale: Initial value of LayerScale.
        position_offset: See `resample_positions`.
        position_antialias: See `resample_positions`.

    Raises:
        ValueError: When image and patch, or width and heads, do not fit.
    """

    def __init__(
        self,
        *,
        image_size_pixels: int,
        patch_size_pixels: int,
        embed_dim: int,
        depth: int,
        num_heads: int,
        num_channels: int = 3,
        mlp_ratio: float = 4.0,
        feed_forward: FeedForward = "mlp",
        num_register_tokens: int = 0,
        drop_path_rate: float = 0.0,
        layer_scale: float = 1e-5,
        position_offset: float = 0.0,
        position_antialias: bool = True,
    ) -> None:
        super().__init__()
        if image_size_pixels % patch_size_pixels or image_size_pixels < patch_size_pixels:
            raise ValueError(
                f"image_size_pixels {image_size_pixels} is not divisible by patch_size_pixels "
                f"{patch_size_pixels}; choose a multiple of {patch_size_pixels}"
            )
        self.embed_dim = embed_dim
        self.num_register_tokens = num_register_tokens
        self.position_offset = position_offset
        self.position_antialias = position_antialias
        num_patches = (image_size_pixels // patch_size_pixels) ** 2
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + num_patches, embed_dim))
        self.mask_token = nn.Parameter(torch.empty(1, embed_dim))
        if num_register_tokens:
            self.register_tokens = nn.Parameter(torch.empty(1, num_register_tokens, embed_dim))
        self.patch_embed = PatchEmbed(
            patch_size_pixels=patch_size_pixels, num_channels=num_channels, embed_dim=embed_dim
        )
        self.blocks = nn.ModuleList(
            Block(
                embed_dim=embed_dim,
                num_heads=num_heads,
                hidden_dim=int(embed_dim * mlp_ratio),
                feed_forward_kind=feed_forward,
                drop_path_rate=drop_path_rate,
                layer_scale=layer_scale,
            )
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(embed_dim, eps=NORM_EPSILON)
        if not self.cls_token.is_meta:
            self.init_weights()

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Initialise every parameter; works on a model that came from the meta device.

        Args:
            generator: Random source, on the device of the parameters; None is the default one.
        """
        nn.init.normal_(self.cls_token, std=1e-6, generator=generator)
        nn.init.trunc_normal_(self.pos_embed, std=0.02, generator=generator)
        nn.init.zeros_(self.mask_token)
        if self.num_register_tokens:
            nn.init.normal_(self.register_tokens, std=1e-6, generator=generator)
        for module in self.modules():
            match module:
                case nn.Linear():
                    nn.init.trunc_normal_(module.weight, std=0.02, generator=generator)
                    nn.init.zeros_(module.bias)
                case nn.LayerNorm():
                    nn.init.ones_(module.weight)
                    nn.init.zeros_(module.bias)
                case LayerScale():
                    module.init_weights()
                case PatchEmbed():
                    module.init_weights(generator)

    def forward(
        self,
        crop_groups: Sequence[Tensor],
        *,
        masks: Sequence[Tensor | None] | None = None,
    ) -> list[Features]:
        """Features of several groups of crops, computed as one packed sequence of tokens.

        Args:
            crop_groups: Per group, images [B, C, H, W]; H and W are multiples of the patch and
                may differ from group to group and from each other.
            masks: Per group, None or bool [B, N]: true where the mask token replaces the patch.

        Returns:
            Per group, the features after the final norm.

        Raises:
            ValueError: When an image is not a whole number of patches, or a mask does not fit.
        """
        if masks is None:
            masks = [None] * len(crop_groups)
        embedded = [
            self._embed(images, mask=mask) for images, mask in zip(crop_groups, masks, strict=True)
        ]
        groups = tuple(CropGroup(num_crops=x.shape[0], num_tokens=x.shape[1]) for x in embedded)
        tokens = torch.cat([x.flatten(0, 1) for x in embedded])  # [T, D]
        for block in self.blocks:
            tokens = block(tokens, groups=groups)
        parts = split_rows(tokens, groups=groups)
        return [
            self._features(part, group=group) for part, group in zip(parts, groups, strict=True)
        ]

    def features(self, images: Tensor) -> Features:
        """Features of one group of images [B, C, H, W], without masks."""
        features: list[Features] = self([images])
        return features[0]

    def _embed(self, images: Tensor, *, mask: Tensor | None) -> Tensor:
        """Images [B, C, H, W] to cls, register and patch tokens [B, 1 + R + N, D]."""
        grid = self.patch_embed.grid(images)
        patches: Tensor = self.patch_embed(images)
        if mask is not None:
            if mask.shape != patches.shape[:2]:
                raise ValueError(
                    f"mask of shape {tuple(mask.shape)} does not fit {patches.shape[0]} images of "
                    f"{patches.shape[1]} patches; give one value per image and patch"
                )
            patches = torch.where(mask[..., None], self.mask_token.to(patches.dtype), patches)
        positions = resample_positions(
            self.pos_embed,
            grid=grid,
            offset=self.position_offset,
            antialias=self.position_antialias,
        )
        batch = images.shape[0]
        cls = (self.cls_token + positions[:, :1]).expand(batch, -1, -1)
        patches = patches + positions[:, 1:]
        if not self.num_register_tokens:
            return torch.cat([cls, patches], dim=1)
        return torch.cat([cls, self.register_tokens.expand(batch, -1, -1), patches], dim=1)

    def _features(self, rows: Tensor, *, group: CropGroup) -> Features:
        """Normalise each part apart, so that no result is a view and unused parts cost nothing."""
        tokens = rows.view(group.num_crops, group.num_tokens, -1)
        first_patch = 1 + self.num_register_tokens
        return Features(
            cls=self.norm(tokens[:, 0]),
            registers=self.norm(tokens[:, 1:first_patch]),
            patches=self.norm(tokens[:, first_patch:]),
        )
