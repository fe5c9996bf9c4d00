"""StudentTeacher: the objective of a student and of its exponential moving average."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self, assert_never

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from dinov2_core.backbones import BackboneNetwork
from dinov2_core.config.objectives import (
    Centering,
    Head,
    SharedHead,
    SinkhornKnopp,
    SoftmaxCentering,
)
from dinov2_core.config.training import TrainingConfig
from dinov2_core.data.batch import PretrainBatch
from dinov2_core.heads import DINOHead, HeadOutput
from dinov2_core.losses.centering import CenteredTargets
from dinov2_core.losses.dino import DinoLosses, dino_losses
from dinov2_core.losses.ibot import ibot_loss
from dinov2_core.losses.koleo import koleo_loss
from dinov2_core.losses.prototypes import Assignments, assignment_health
from dinov2_core.losses.sinkhorn import SinkhornTargets
from dinov2_core.models import build_backbone, build_head
from dinov2_core.vit.transformer import Features


@dataclass(frozen=True, slots=True, kw_only=True)
class Losses:
    """The objective of one batch on this rank; total is the sum of the four terms."""

    total: Tensor
    """Scalar float32 with gradient."""
    dino_local: Tensor
    """Weighted image-level term of the local crops."""
    dino_global: Tensor
    """Weighted image-level term of the global crops."""
    ibot: Tensor
    """Weighted masked-patch term; the reference logs half of it."""
    koleo: Tensor
    """Weighted nearest-neighbour term of both global crops; the reference logs half of it."""
    teacher_entropy: Tensor
    """Mean entropy of the teacher's cls targets, nats."""
    prototype_usage: Tensor
    """Distinct best prototypes per cls token of the teacher, in (0, 1]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """The weighted terms of the objective, scalars float32 with gradient; see `Losses`."""

    dino_local: Tensor
    dino_global: Tensor
    ibot: Tensor
    koleo: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Projections:
    """Head outputs of cls tokens and of masked patches."""

    cls: HeadOutput
    """Features [.., d] of the cls tokens."""
    patches: HeadOutput
    """Features [M, d] of the masked patches."""


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

    def project(self, *, cls: Tensor, patches: Tensor) -> Projections:
        """Run the heads, a shared one once on all tokens.

        Args:
            cls: Tokens [.., D] of crops.
            patches: Tokens [M, D] of masked patches.
        """
        if self.ibot_head is not None:
            return Projections(cls=self.dino_head(cls), patches=self.ibot_head(patches))
        output: HeadOutput = self.dino_head(torch.cat([cls, patches]))
        features = torch.split(output.features, [cls.shape[0], patches.shape[0]])
        return Projections(
            cls=HeadOutput(features=features[0], prototypes=output.prototypes),
            patches=HeadOutput(features=features[1], prototypes=output.prototypes),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherTargets:
    """What the student is asked to predict."""

    cls: Assignments
    """Of the 2B global crops."""
    patches: Assignments
    """Of the M masked patches; 0 for rows that only pad."""

    def split(self, parts: Sequence[PretrainBatch]) -> list[TeacherTargets]:
        """The targets of each part of the batch that they were made for."""
        cls = self.cls.split([part.global_crops.shape[0] for part in parts])
        patches = self.patches.split([part.masked_indices.shape[0] for part in parts])
        return [
            TeacherTargets(cls=own_cls, patches=own_patches)
            for own_cls, own_patches in zip(cls, patches, strict=True)
        ]


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
        ibot_head = _ibot_head_settings(config)
        self.dino_targets = _targets(
            config.centering, num_prototypes=config.dino.head.num_prototypes
        )
        self.ibot_targets = _targets(config.centering, num_prototypes=ibot_head.num_prototypes)
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

    def forward(self, batch: PretrainBatch, *, teacher_temperature: float) -> Losses:
        """Losses of one batch. Collective over the ranks.

        Args:
            batch: Crops and masks of this rank's images.
            teacher_temperature: Divides the teacher's scores; > 0, no unit.

        Returns:
            The total with gradient and its parts without.
        """
        targets = self.teacher_targets([batch], temperature=teacher_temperature)
        terms = self.student_terms(batch, targets=targets, koleo=self.koleo_term)
        return losses_of(terms, targets=targets)

    def student_features(self, batch: PretrainBatch) -> list[Features]:
        """What the student's backbone says of global and, where there are some, local crops."""
        has_local_crops = batch.local_crops.shape[0] > 0
        features: list[Features] = self.student.backbone(
            [batch.global_crops, batch.local_crops] if has_local_crops else [batch.global_crops],
            masks=[batch.masks, None] if has_local_crops else [batch.masks],
        )
        return features

    def student_terms(
        self,
        batch: PretrainBatch,
        *,
        targets: TeacherTargets,
        koleo: Callable[[Tensor], Tensor],
    ) -> Terms:
        """The objective of a batch, or of a part of it, under given targets.

        Args:
            batch: Crops and masks.
            targets: Of the same crops and masked patches.
            koleo: Gives the last term from the student's cls tokens [2B, D] of the global crops.
        """
        num_crops = batch.global_crops.shape[0]
        global_features, *local_features = self.student_features(batch)
        projections = self.student.project(
            cls=torch.cat([*(crops.cls for crops in local_features), global_features.cls]),
            patches=_masked(global_features.patches, batch=batch),
        )
        dino = self._dino_losses(projections.cls, targets=targets.cls, num_crops=num_crops)
        ibot = self.config.ibot.weight * ibot_loss(
            targets.patches,
            features=projections.patches.features,
            prototypes=projections.patches.prototypes,
            mask_weights=batch.mask_weights,
            num_crops=num_crops,
            student_temperature=self.config.student_temperature,
        )
        return Terms(
            dino_local=dino.local_crops,
            dino_global=dino.global_crops,
            ibot=ibot,
            koleo=koleo(global_features.cls),
        )

    @torch.no_grad()
    def update_teacher(self, momentum: float, *, is_backbone_frozen: bool = False) -> None:
        """Move the teacher towards the student: momentum teacher + (1 - momentum) student.

        A frozen backbone is left out: it is equal in both, and rounding would move it.

        Parameters are looked up anew and as shards: a list kept from before a forward may hold
        tensors that a sharded module no longer uses.
        """
        for name, averaged in self.teacher.named_children():
            if is_backbone_frozen and name == "backbone":
                continue
            teacher, student = _shards(averaged), _shards(self.student.get_submodule(name))
            torch._foreach_mul_(teacher, momentum)
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
        projections = []
        for part in parts:
            (features,) = self.teacher.backbone([part.global_crops])
            patches = _masked(features.patches, batch=part)
            projections.append(self.teacher.project(cls=features.cls, patches=patches))
        return TeacherTargets(
            cls=self.dino_targets(
                torch.cat([part.cls.features for part in projections]),
                prototypes=projections[0].cls.prototypes,
                temperature=temperature,
            ),
            patches=self.ibot_targets(
                torch.cat([part.patches.features for part in projections]),
                prototypes=projections[0].patches.prototypes,
                temperature=temperature,
                is_sample=_is_sample(parts),
            ),
        )

    def _dino_losses(
        self, student: HeadOutput, *, targets: Assignments, num_crops: int
    ) -> DinoLosses:
        """Weighted image-level terms; student rows are local crops, then global ones."""
        num_local = student.features.shape[0] - num_crops
        local_features, global_features = torch.split(student.features, [num_local, num_crops])
        losses = dino_losses(
            targets,
            global_features=global_features,
            local_features=local_features,
            prototypes=student.prototypes,
            student_temperature=self.config.student_temperature,
        )
        weight = self.config.dino.weight
        return DinoLosses(
            local_crops=weight * losses.local_crops, global_crops=weight * losses.global_crops
        )

    def koleo_term(self, cls: Tensor) -> Tensor:
        """Weighted sum over the two global crops, each with neighbours of its own kind.

        Args:
            cls: Student's cls tokens [2B, D] of the whole batch. Collective.
        """
        koleo = self.config.koleo
        if koleo is None:
            return cls.new_zeros((), dtype=torch.float32)
        losses = [koleo_loss(crop, neighbours=koleo.neighbours) for crop in cls.chunk(2)]
        return koleo.weight * torch.stack(losses).sum()


def losses_of(terms: Terms, *, targets: TeacherTargets) -> Losses:
    """The losses of a batch from its terms and the whole batch's targets."""
    health = assignment_health(targets.cls)
    return Losses(
        total=terms.dino_local + terms.dino_global + terms.koleo + terms.ibot,
        dino_local=terms.dino_local.detach(),
        dino_global=terms.dino_global.detach(),
        ibot=terms.ibot.detach(),
        koleo=terms.koleo.detach(),
        teacher_entropy=health.entropy,
        prototype_usage=health.usage,
    )


def _backbone_with_heads(config: TrainingConfig, *, image_size_pixels: int) -> BackboneWithHeads:
    in_dim = config.backbone.dimensions.embed_dim
    is_shared = isinstance(config.ibot.head, SharedHead)
    return BackboneWithHeads(
        backbone=build_backbone(config.backbone, image_size_pixels=image_size_pixels),
        dino_head=build_head(config.dino.head, in_dim=in_dim),
        ibot_head=None if is_shared else build_head(_ibot_head_settings(config), in_dim=in_dim),
    )


def _ibot_head_settings(config: TrainingConfig) -> Head:
    match config.ibot.head:
        case Head() as own:
            return own
        case SharedHead():
            return config.dino.head
        case _:
            assert_never(config.ibot.head)


def _targets(centering: Centering, *, num_prototypes: int) -> SinkhornTargets | CenteredTargets:
    match centering:
        case SinkhornKnopp(num_iterations=num_iterations):
            return SinkhornTargets(num_iterations=num_iterations)
        case SoftmaxCentering(momentum=momentum):
            return CenteredTargets(num_prototypes=num_prototypes, momentum=momentum)
        case _:
            assert_never(centering)


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
