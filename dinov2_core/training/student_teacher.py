"""StudentTeacher: the objective of a student and of its exponential moving average."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self, assert_never

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from dinov2_core.backbones import BackboneNetwork
from dinov2_core.config.objectives import SharedHead
from dinov2_core.config.training import TrainingConfig
from dinov2_core.data.batch import PretrainBatch
from dinov2_core.heads import DINOHead, HeadOutput
from dinov2_core.losses.terms import CoupledTerm, LossInputs, MeanTerm, Predictions
from dinov2_core.models import build_backbone, build_head
from dinov2_core.training.objective import TeacherTargets, loss_terms, target_assignment
from dinov2_core.training.random_state import RandomState
from dinov2_core.vit.transformer import Features


@dataclass(frozen=True, slots=True, kw_only=True)
class WholeBatch:
    """What a part must know of the batch that it belongs to."""

    num_parts: int
    """Equal parts of the batch."""
    coupled: tuple[dict[str, Tensor], ...] = ()
    """Losses of each coupled term without weight and graph, in the order of the terms."""
    cls_gradient: Tensor | None = None
    """Gradient of their weighted sum with respect to the part's cls tokens, [2b, D] float32; None
    without coupled terms."""
    random_state: RandomState | None = None
    """From before the first forward pass of the part, so that a second one drops the same paths."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightedLosses:
    """The weighted loss terms of a batch or of a part."""

    by_name: dict[str, Tensor]
    """Without graph, in the order in which they are added."""
    objective: Tensor
    """Its gradient is the share of the batch or part in that of the whole batch's objective."""


class BackboneWithHeads(nn.Module):
    """A backbone, the head of its cls token and that of its patches (None when shared)."""

    def __init__(
        self, *, backbone: BackboneNetwork, dino_head: DINOHead, ibot_head: DINOHead | None
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.dino_head = dino_head
        self.ibot_head = ibot_head

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Initialise every parameter; works on modules that came from the meta device."""
        self.backbone.init_weights(generator)
        self.dino_head.init_weights(generator)
        if self.ibot_head is not None:
            self.ibot_head.init_weights(generator)

    def project(self, *, cls: Tensor, patches: Tensor) -> tuple[HeadOutput, HeadOutput]:
        """Run the heads, a shared one once on all tokens.

        Args:
            cls: Tokens [.., D] of crops.
            patches: Tokens [M, D] of masked patches.

        Returns:
            Outputs for the cls tokens and for the patches.
        """
        if self.ibot_head is not None:
            return self.dino_head(cls), self.ibot_head(patches)
        output: HeadOutput = self.dino_head(torch.cat([cls, patches]))
        first, second = torch.split(output.features, [cls.shape[0], patches.shape[0]])
        return replace(output, features=first), replace(output, features=second)


class StudentTeacher(nn.Module):
    """Student, teacher and the objective between them, arXiv:2304.07193.

    The teacher starts equal to the student, takes no gradient and stays in eval mode.
    Submodules are only called through their forward, so that sharding may be applied from
    outside to student and teacher alike.

    Args:
        config: What is learned.
        image_size_pixels: Side of the image that the learned positions belong to; the global
            crop's in the recipe.
    """

    def __init__(self, config: TrainingConfig, *, image_size_pixels: int) -> None:
        super().__init__()
        self.config = config
        self.student = _backbone_with_heads(config, image_size_pixels=image_size_pixels)
        self.teacher = _backbone_with_heads(config, image_size_pixels=image_size_pixels)
        self.dino_targets = target_assignment(config.centering, head=config.dino.head)
        self.ibot_targets = target_assignment(config.centering, head=config.patch_head)
        self.terms = loss_terms(config)
        self.teacher.requires_grad_(False)
        self.teacher.eval()
        if not next(self.student.parameters()).is_meta:
            self.copy_student_to_teacher()

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Initialise the student, copy it to the teacher, forget centres.

        Args:
            generator: Random source, on the device of the parameters; None is the default one.
        """
        self.student.init_weights(generator)
        self.dino_targets.init_weights()
        self.ibot_targets.init_weights()
        self.copy_student_to_teacher()

    def train(self, mode: bool = True) -> Self:
        """Switch the student; the teacher stays in eval mode."""
        super().train(mode)
        self.teacher.eval()
        return self

    def forward(
        self, batch: PretrainBatch, *, targets: TeacherTargets, whole: WholeBatch | None = None
    ) -> WeightedLosses:
        """Weighted losses of a batch, or of a part of one. Collective over the ranks.

        Args:
            batch: Crops and masks of this rank's images.
            targets: Of the same crops and masked patches.
            whole: The batch that this one is a part of; None for a whole batch.

        Raises:
            ValueError: Two terms are logged under the same name.
        """
        inputs = self._loss_inputs(batch, targets=targets)
        coupled = None if whole is None else iter(whole.coupled)
        by_name: dict[str, Tensor] = {}
        objective = torch.zeros((), device=batch.global_crops.device)
        for term in self.terms:
            num_shares = 1
            match term:
                case MeanTerm():
                    losses = term.losses(inputs)
                    num_shares = 1 if whole is None else whole.num_parts
                case CoupledTerm():
                    losses = next(coupled) if coupled else term.losses(inputs.cls_tokens)
                case _:
                    assert_never(term)
            for name, loss in losses.items():
                if name in by_name:
                    raise ValueError(f"two loss terms are logged as {name}; rename one of them")
                weighted = term.weight * loss
                by_name[name] = weighted.detach()
                objective = objective + weighted / num_shares
        if whole is not None and whole.cls_gradient is not None:
            objective = objective + (inputs.cls_tokens.float() * whole.cls_gradient).sum()
        return WeightedLosses(by_name=by_name, objective=objective)

    def student_features(self, batch: PretrainBatch) -> list[Features]:
        """Features of the student's backbone: global and, where there are some, local crops."""
        has_local_crops = batch.local_crops.shape[0] > 0
        features: list[Features] = self.student.backbone(
            [batch.global_crops, batch.local_crops] if has_local_crops else [batch.global_crops],
            masks=[batch.masks, None] if has_local_crops else [batch.masks],
        )
        return features

    def _loss_inputs(self, batch: PretrainBatch, *, targets: TeacherTargets) -> LossInputs:
        global_features, *local_features = self.student_features(batch)
        cls, patches = self.student.project(
            cls=torch.cat([*(crops.cls for crops in local_features), global_features.cls]),
            patches=_masked(global_features.patches, batch=batch),
        )
        return LossInputs(
            global_crops=batch.global_crops,
            cls_tokens=global_features.cls,
            patch_tokens=global_features.patches,
            cls=Predictions(features=cls.features, prototypes=cls.prototypes, targets=targets.cls),
            patches=Predictions(
                features=patches.features, prototypes=patches.prototypes, targets=targets.patches
            ),
            mask_weights=batch.mask_weights,
        )

    @torch.no_grad()
    def update_teacher(
        self,
        momentum: float,
        *,
        is_backbone_frozen: bool = False,
        is_skipped: Tensor | None = None,
    ) -> None:
        """Move the teacher towards the student: momentum teacher + (1 - momentum) student.

        A frozen backbone is left out: it is equal in both, and rounding would move it.

        The lists of parameters are made for every update, of shards: one from before a forward
        pass may hold tensors that a sharded module no longer uses.

        Args:
            momentum: Share of the old teacher.
            is_backbone_frozen: Whether only heads move.
            is_skipped: Scalar bool on the device; where true, nothing changes. None is false.
        """
        for name, averaged in self.teacher.named_children():
            if is_backbone_frozen and name == "backbone":
                continue
            teacher, student = _shards(averaged), _shards(self.student.get_submodule(name))
            kept: float | Tensor = momentum
            if is_skipped is not None:
                kept = is_skipped.new_full((), momentum, dtype=torch.float32)
                kept = kept.masked_fill(is_skipped, 1.0)
                student = [weights.masked_fill(is_skipped, 0.0) for weights in student]
            torch._foreach_mul_(teacher, kept)
            torch._foreach_add_(teacher, student, alpha=1 - momentum)

    @torch.no_grad()
    def copy_student_to_teacher(self) -> None:
        """Make the teacher equal to the student."""
        for teacher, student in zip(_shards(self.teacher), _shards(self.student), strict=True):
            teacher.copy_(student)

    def clip_gradients(self, max_norm: float) -> dict[str, Tensor]:
        """Clip backbone and each head apart. Collective when sharded.

        Returns:
            Gradient norm of each before clipping: backbone, dino_head and, when the student has
            one, ibot_head; scalars, not DTensors.
        """
        norms = {}
        for name, module in self.student.named_children():
            parameters = [p for p in module.parameters() if p.grad is not None]
            norm = nn.utils.clip_grad_norm_(parameters, max_norm)
            norms[name] = norm.full_tensor() if isinstance(norm, DTensor) else norm
        return norms

    @torch.no_grad()
    def teacher_targets(
        self, parts: Sequence[PretrainBatch], *, temperature: float
    ) -> TeacherTargets:
        """Targets from the unmasked global crops, assigned over the whole batch. Collective.

        Args:
            parts: The batch, whole or split; rows follow part after part.
            temperature: Divides the teacher's scores; > 0, no unit.
        """
        cls, patches = [], []
        for part in parts:
            (features,) = self.teacher.backbone([part.global_crops])
            of_cls, of_patches = self.teacher.project(
                cls=features.cls, patches=_masked(features.patches, batch=part)
            )
            cls.append(of_cls)
            patches.append(of_patches)
        return TeacherTargets(
            cls=self.dino_targets(
                torch.cat([output.features for output in cls]),
                prototypes=cls[0].prototypes,
                temperature=temperature,
            ),
            patches=self.ibot_targets(
                torch.cat([output.features for output in patches]),
                prototypes=patches[0].prototypes,
                temperature=temperature,
                is_sample=_is_sample(parts),
            ),
        )


def _backbone_with_heads(config: TrainingConfig, *, image_size_pixels: int) -> BackboneWithHeads:
    in_dim = config.backbone.dimensions.embed_dim
    is_shared = isinstance(config.ibot.head, SharedHead)
    return BackboneWithHeads(
        backbone=build_backbone(config.backbone, image_size_pixels=image_size_pixels),
        dino_head=build_head(config.dino.head, in_dim=in_dim),
        ibot_head=None if is_shared else build_head(config.patch_head, in_dim=in_dim),
    )


def _masked(patches: Tensor, *, batch: PretrainBatch) -> Tensor:
    """Masked patches [M, D] of patch tokens [2B, N, D]."""
    return patches.flatten(0, 1).index_select(0, batch.masked_indices)


def _is_sample(parts: Sequence[PretrainBatch]) -> Tensor | None:
    """[M] bool, false for rows that only pad; None where there are none."""
    weights = torch.cat([part.mask_weights for part in parts])
    return None if sum(part.num_masked for part in parts) == weights.shape[0] else weights > 0


def _shards(module: nn.Module) -> list[Tensor]:
    """This rank's part of every parameter; puts gathered parameters of a sharded module back."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()
    return [p.to_local() if isinstance(p, DTensor) else p for p in module.parameters()]
