"""DINOHead: MLP, bottleneck, L2 normalisation, prototypes."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NORM_EPSILON = 1e-12


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadOutput:
    """Normalised features and the prototypes they are scored against.

    The scores themselves, [.., K], are not computed: the losses go over K in chunks.
    """

    features: Tensor
    """[.., d] of length 1, in the compute type of the head."""
    prototypes: Tensor
    """[K, d] effective prototypes, weight_g times the normalised weight_v, same type."""

    def logits(self) -> Tensor:
        """Scores [.., K] in float32, the whole matrix."""
        logits: Tensor = self.features.float() @ self.prototypes.float().T
        return logits


class Prototypes(nn.Module):
    """K directions weight_v with a length weight_g each (weight normalisation, no bias)."""

    def __init__(self, *, num_prototypes: int, bottleneck_dim: int) -> None:
        super().__init__()
        self.weight_g = nn.Parameter(torch.empty(num_prototypes, 1))
        self.weight_v = nn.Parameter(torch.empty(num_prototypes, bottleneck_dim))

    def init_weights(self, generator: torch.Generator | None) -> None:
        """Length 1, directions as the weights of a linear layer by default."""
        nn.init.ones_(self.weight_g)
        nn.init.kaiming_uniform_(self.weight_v, a=math.sqrt(5), generator=generator)

    def forward(self) -> Tensor:
        """Effective prototypes [K, d], computed in float32, in the type of the weights."""
        prototypes: Tensor = torch._weight_norm(self.weight_v, self.weight_g, 0)
        return prototypes


class DINOHead(nn.Module):
    """Projection head of DINO and iBOT, arXiv:2104.14294; parameters have the reference's names.

    Args:
        in_dim: Width D of the tokens.
        hidden_dim: Width of the hidden layers.
        bottleneck_dim: Width d of the normalised features.
        num_prototypes: Number K of prototypes.
        num_layers: Linear layers before the prototypes, >= 1.
    """

    def __init__(
        self,
        *,
        in_dim: int,
        hidden_dim: int,
        bottleneck_dim: int,
        num_prototypes: int,
        num_layers: int = 3,
    ) -> None:
        super().__init__()
        if num_layers < 1:
            raise ValueError(f"num_layers {num_layers} leaves no layer; choose at least 1")
        widths = [in_dim, *[hidden_dim] * (num_layers - 1), bottleneck_dim]
        layers: list[nn.Module] = []
        for width, next_width in itertools.pairwise(widths):
            layers += [nn.Linear(width, next_width), nn.GELU()]
        self.mlp = nn.Sequential(*layers[:-1])
        self.last_layer = Prototypes(num_prototypes=num_prototypes, bottleneck_dim=bottleneck_dim)
        if not self.last_layer.weight_g.is_meta:
            self.init_weights()

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Initialise every parameter; works on a head that came from the meta device.

        Args:
            generator: Random source, on the device of the parameters; None is the default one.
        """
        for module in self.mlp:
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02, generator=generator)
                nn.init.zeros_(module.bias)
        self.last_layer.init_weights(generator)

    def forward(self, tokens: Tensor) -> HeadOutput:
        """Tokens [.., D] to normalised features [.., d] and the prototypes."""
        return HeadOutput(features=self.project(tokens), prototypes=self.prototypes())

    def project(self, tokens: Tensor) -> Tensor:
        """Tokens [.., D] to features [.., d] of length 1, normalised in float32."""
        bottleneck: Tensor = self.mlp(tokens)
        normalised = F.normalize(bottleneck.float(), dim=-1, eps=NORM_EPSILON)
        return normalised.to(bottleneck.dtype)

    def prototypes(self) -> Tensor:
        """Effective prototypes [K, d]."""
        prototypes: Tensor = self.last_layer()
        return prototypes
