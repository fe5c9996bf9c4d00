"""Settings of the objective: loss terms, heads and teacher targets."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from dinov2_core.config.frozen import Frozen


class Head(Frozen):
    """Projection head: MLP, bottleneck, L2 normalisation, prototypes."""

    kind: Literal["own"] = "own"
    num_prototypes: int = Field(65536, ge=2)
    """Number K of prototypes; 131072 in the long recipes."""
    bottleneck_dim: int = Field(256, ge=2)
    """Width of the normalised features that meet the prototypes."""
    hidden_dim: int = Field(2048, ge=2)
    """Width of the MLP's hidden layers."""
    num_layers: int = Field(3, ge=1)
    """Linear layers before the prototypes."""


class SharedHead(Frozen):
    """Patches use the head of the cls token."""

    kind: Literal["shared"] = "shared"


class DinoObjective(Frozen):
    """Image-level cross-entropy between student and teacher, arXiv:2104.14294."""

    weight: float = Field(1.0, ge=0)
    """Factor of the loss."""
    head: Head
    """Projection head of the cls token."""


class IbotObjective(Frozen):
    """Cross-entropy on masked patches, arXiv:2111.07832."""

    weight: float = Field(1.0, ge=0)
    """Factor of the loss."""
    head: Annotated[Head | SharedHead, Field(discriminator="kind")]
    """Projection head of the masked patches, of their own or shared with the cls token."""


class KoleoObjective(Frozen):
    """Spreads the cls tokens of a batch, arXiv:1806.03198."""

    weight: float = Field(0.1, ge=0)
    """Factor of the loss, for each of the two global crops."""
    neighbours: Literal["global_batch", "rank"] = "global_batch"
    """Images among which the nearest neighbour is searched; the reference takes those of its own
    rank only."""


class SinkhornKnopp(Frozen):
    """Teacher targets by Sinkhorn-Knopp, arXiv:2006.09882."""

    kind: Literal["sinkhorn_knopp"] = "sinkhorn_knopp"
    num_iterations: int = Field(3, ge=1)
    """Row-and-column normalisations of each teacher batch."""


class SoftmaxCentering(Frozen):
    """Teacher targets by softmax after subtracting a running mean, arXiv:2104.14294."""

    kind: Literal["softmax"] = "softmax"
    momentum: float = Field(0.9, ge=0, lt=1)
    """Momentum of the running mean of teacher scores."""


Centering = Annotated[SinkhornKnopp | SoftmaxCentering, Field(discriminator="kind")]


class Objectives(Frozen):
    """Every loss term and what they share; a new term is a class above and a field here."""

    dino: DinoObjective
    """Objective of the cls token."""
    ibot: IbotObjective
    """Objective of the masked patches."""
    koleo: KoleoObjective | None = KoleoObjective()
    """Left out when null."""
    centering: Centering = SinkhornKnopp()
    """How teacher scores become targets."""
    student_temperature: float = Field(0.1, gt=0)
    """Softmax temperature of the student."""

    @property
    def patch_head(self) -> Head:
        """Head of the masked patches: their own, or that of the cls token."""
        return self.dino.head if isinstance(self.ibot.head, SharedHead) else self.ibot.head
