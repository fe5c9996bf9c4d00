"""The same training step as people write it first, to measure the product against.

Float32, one forward pass per size of crop, whole matrices of scores, timm's backbone.
"""

from __future__ import annotations

import copy
import itertools
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov2_core.config.objectives import SharedHead
from dinov2_core.config.training import TrainingConfig
from dinov2_core.data.batch import PretrainBatch
from dinov2_core.training.schedules import StepSchedule


class NaiveHead(nn.Module):
    """MLP, bottleneck, L2 normalisation, prototypes of length 1."""

    def __init__(self, *, in_dim: int, hidden_dim: int, bottleneck_dim: int, num_prototypes: int):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(in_dim, hidden_dim),
            nn.GELU(),
            nn.Linear(hidden_dim, hidden_dim),
            nn.GELU(),
            nn.Linear(hidden_dim, bottleneck_dim),
        )
        self.prototypes = nn.Parameter(torch.empty(num_prototypes, bottleneck_dim))
        nn.init.trunc_normal_(self.prototypes, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens [.., D] to scores [.., K]."""
        return F.normalize(self.mlp(tokens), dim=-1) @ F.normalize(self.prototypes, dim=-1).T


class NaiveNetwork(nn.Module):
    """Backbone and one head for cls tokens and patches."""

    def __init__(self, config: TrainingConfig) -> None:
        super().__init__()
        if not isinstance(config.ibot.head, SharedHead):
            raise ValueError("ibot.head own is not in the naive step; set it to shared")
        dimensions, head = config.backbone.dimensions, config.dino.head
        self.backbone: Any = timm.models.vision_transformer.VisionTransformer(
            img_size=config.crops.global_crop_size_pixels,
            patch_size=config.backbone.patch_size_pixels,
            in_chans=config.backbone.num_channels,
            embed_dim=dimensions.embed_dim,
            depth=dimensions.depth,
            num_heads=dimensions.num_heads,
            mlp_ratio=dimensions.mlp_ratio,
            init_values=config.backbone.layer_scale,
            drop_path_rate=config.backbone.drop_path_rate,
            num_classes=0,
            global_pool="",
            dynamic_img_size=True,
        )
        self.mask_token = nn.Parameter(torch.zeros(1, dimensions.embed_dim))
        self.head = NaiveHead(
            in_dim=dimensions.embed_dim,
            hidden_dim=head.hidden_dim,
            bottleneck_dim=head.bottleneck_dim,
            num_prototypes=head.num_prototypes,
        )

    def forward(self, images: Tensor, mask: Tensor | None = None) -> Tensor:
        """Images [B, C, H, W] to tokens [B, 1 + N, D]."""
        patches = self.backbone.patch_embed(images)  # [B, h, w, D]
        if mask is not None:
            mask = mask.view(patches.shape[:3])
            patches = torch.where(mask[..., None], self.mask_token, patches)
        tokens = self.backbone._pos_embed(patches)
        return self.backbone.norm(self.backbone.blocks(tokens))  # type: ignore[no-any-return]


class NaiveTrainer:
    """Student, teacher, AdamW."""

    def __init__(self, config: TrainingConfig) -> None:
        self.config = config
        self.student = NaiveNetwork(config)
        self.teacher = copy.deepcopy(self.student).eval().requires_grad_(False)
        self.optimizer = torch.optim.AdamW(self.student.parameters())

    def step(self, batch: PretrainBatch, *, schedule: StepSchedule) -> float:
        """Losses, gradients, weights, moving average; gives the total loss."""
        self.optimizer.zero_grad()
        loss = self.loss(batch, teacher_temperature=schedule.teacher_temperature)
        loss.backward()
        for part in (self.student.backbone, self.student.head):
            nn.utils.clip_grad_norm_(part.parameters(), self.config.optimization.clip_norm)
        for group in self.optimizer.param_groups:
            group["lr"], group["weight_decay"] = schedule.learning_rate, schedule.weight_decay
        self.optimizer.step()
        with torch.no_grad():
            pairs = zip(self.teacher.parameters(), self.student.parameters(), strict=True)
            for averaged, trained in pairs:
                averaged.lerp_(trained, 1 - schedule.teacher_momentum)
        return loss.item()

    def loss(self, batch: PretrainBatch, *, teacher_temperature: float) -> Tensor:
        """The four terms of the objective."""
        with torch.no_grad():
            seen = self.teacher(batch.global_crops)
            cls_targets = sinkhorn(self.teacher.head(seen[:, 0]) / teacher_temperature)
            masked = seen[:, 1:].flatten(0, 1)[batch.masked_indices]
            patch_targets = sinkhorn(self.teacher.head(masked) / teacher_temperature)
        global_tokens = self.student(batch.global_crops, batch.masks)
        local_tokens = self.student(batch.local_crops)
        temperature = self.config.student_temperature
        global_scores = self.student.head(global_tokens[:, 0]) / temperature
        local_scores = self.student.head(local_tokens[:, 0]) / temperature
        patches = global_tokens[:, 1:].flatten(0, 1)[batch.masked_indices]
        patch_scores = self.student.head(patches) / temperature

        num_images = batch.global_crops.shape[0] // 2
        targets = cls_targets.split(num_images)
        views = [*global_scores.split(num_images), *local_scores.split(num_images)]
        pairs = [(t, v) for t, v in itertools.product(range(2), range(len(views))) if t != v]
        dino = torch.stack([cross_entropy(targets[t], views[v]).mean() for t, v in pairs]).mean()
        ibot = cross_entropy(patch_targets, patch_scores) * batch.mask_weights
        koleo = torch.stack([nearest_entropy(x) for x in global_tokens[:, 0].split(num_images)])
        weight = self.config.koleo.weight if self.config.koleo else 0.0
        return dino + ibot.sum() / (2 * num_images) + weight * koleo.sum()


def cross_entropy(targets: Tensor, scores: Tensor) -> Tensor:
    """Of every row, [B]."""
    return -(targets * F.log_softmax(scores, dim=-1)).sum(dim=-1)


def sinkhorn(scores: Tensor) -> Tensor:
    """Three row and column normalisations of exp(scores) [B, K]."""
    weights = torch.exp(scores).T
    weights /= weights.sum()
    for _ in range(3):
        weights /= weights.sum(dim=1, keepdim=True) * weights.shape[0]
        weights /= weights.sum(dim=0, keepdim=True) * weights.shape[1]
    return (weights * weights.shape[1]).T


def nearest_entropy(tokens: Tensor) -> Tensor:
    """KoLeo, arXiv:1806.03198."""
    unit = F.normalize(tokens, dim=-1)
    similarity = (unit @ unit.T).detach().fill_diagonal_(-2)
    return -(unit - unit[similarity.argmax(dim=1)]).norm(dim=1).add(1e-8).log().mean()
