"""terms: a new term of either kind trains in parts as it does whole, and none is forgotten."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dinov2_core.config.backbone import Backbone, Dimensions
from dinov2_core.config.objectives import DinoObjective, Head, IbotObjective, KoleoObjective
from dinov2_core.config.training import Crops, TrainingConfig
from dinov2_core.data.batch import PretrainBatch
from dinov2_core.losses.terms import CoupledTerm, LossInputs, LossTerm, MeanTerm
from dinov2_core.training.accumulation import accumulate_gradients
from dinov2_core.training.objective import Losses
from dinov2_core.training.student_teacher import StudentTeacher

NUM_IMAGES = 8
HEAD = Head(num_prototypes=24, bottleneck_dim=8, hidden_dim=16)
CONFIG = TrainingConfig(
    backbone=Backbone(
        architecture=Dimensions(embed_dim=16, depth=2, num_heads=2),
        patch_size_pixels=4,
        layer_scale=0.3,
        drop_path_rate=0.0,
    ),
    crops=Crops(global_crop_size_pixels=8, local_crop_size_pixels=4, num_local_crops=2),
    dino=DinoObjective(head=HEAD),
    ibot=IbotObjective(head=HEAD),
    precision="fp32",
)


def gram_loss(inputs: LossInputs) -> dict[str, Tensor]:
    """Similarities of the student's patch tokens follow those of the crops' pixels."""
    patches = F.normalize(inputs.patch_tokens.float(), dim=-1)
    pixels = F.unfold(inputs.global_crops, kernel_size=4, stride=4).transpose(1, 2)
    pixels = F.normalize(pixels, dim=-1)
    difference = patches @ patches.transpose(1, 2) - pixels @ pixels.transpose(1, 2)
    return {"gram": difference.square().mean()}


def kde_loss(cls_tokens: Tensor) -> dict[str, Tensor]:
    """Log density of the cls tokens under a kernel on the sphere, over all pairs of the batch."""
    density = torch.zeros(())
    for crop in F.normalize(cls_tokens.float(), dim=-1).chunk(2):
        density = density + (crop @ crop.T * 5).exp().mean(dim=1).log().mean()
    return {"kde": density}


NEW_TERMS = (
    MeanTerm(weight=0.7, losses=gram_loss),
    CoupledTerm(weight=0.4, losses=kde_loss),
)


def make_model(*added: LossTerm, koleo: KoleoObjective | None = KoleoObjective()) -> StudentTeacher:  # noqa: B008
    config = CONFIG.model_copy(update={"koleo": koleo})
    model = StudentTeacher(config, image_size_pixels=8).train()
    model.init_weights(torch.Generator().manual_seed(0))
    with torch.no_grad():  # away from the start, where all cls tokens are nearly equal
        for parameter in model.student.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    model.terms = (*model.terms, *added)
    return model


def make_batch() -> PretrainBatch:
    generator = torch.Generator().manual_seed(1)
    masks = torch.rand(2 * NUM_IMAGES, 4, generator=generator) < 0.4
    indices = masks.flatten().nonzero().flatten()
    return PretrainBatch(
        global_crops=torch.randn(2 * NUM_IMAGES, 3, 8, 8, generator=generator),
        local_crops=torch.randn(2 * NUM_IMAGES, 3, 4, 4, generator=generator),
        masks=masks,
        masked_indices=indices,
        mask_weights=(1 / masks.sum(1).clamp(min=1))[:, None].expand_as(masks)[masks],
        num_masked=len(indices),
    )


@dataclass(frozen=True)
class Gradients:
    losses: Losses
    by_name: dict[str, Tensor]


@functools.cache
def gradients_of(*added: LossTerm, num_parts: int, koleo: KoleoObjective | None) -> Gradients:
    torch.manual_seed(0)
    model = make_model(*added, koleo=koleo)
    parts = make_batch().split(num_parts)
    losses = accumulate_gradients(model, parts, teacher_temperature=0.05)
    gradients = {name: p.grad for name, p in model.student.named_parameters()}
    assert all(gradient is not None for gradient in gradients.values())
    return Gradients(losses=losses, by_name=gradients)  # type: ignore[arg-type]


@pytest.mark.parametrize("koleo", [KoleoObjective(), None])
@pytest.mark.parametrize("num_parts", [2, 4])
def test_new_terms_have_the_same_gradients_in_parts(
    koleo: KoleoObjective | None, num_parts: int
) -> None:
    whole = gradients_of(*NEW_TERMS, num_parts=1, koleo=koleo)
    parts = gradients_of(*NEW_TERMS, num_parts=num_parts, koleo=koleo)
    assert list(whole.losses.terms) == [
        "dino_local", "dino_global", "koleo", "ibot", "gram", "kde",
    ]  # fmt: skip
    for name, loss in whole.losses.by_name().items():
        torch.testing.assert_close(parts.losses.by_name()[name], loss, atol=0, rtol=2e-6)
    for name, gradient in whole.by_name.items():
        assert (parts.by_name[name] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-8, name


@pytest.mark.parametrize("num_parts", [1, 2, 4])
@pytest.mark.parametrize("term", NEW_TERMS)
def test_each_new_term_reaches_the_gradient(term: LossTerm, num_parts: int) -> None:
    """Against torch's own gradient of the term on the undivided batch."""
    without = gradients_of(num_parts=num_parts, koleo=KoleoObjective())
    added = gradients_of(term, num_parts=num_parts, koleo=KoleoObjective())
    torch.manual_seed(0)
    model, batch = make_model(), make_batch()
    features = model.student_features(batch)[0]
    losses: dict[str, Tensor] = (
        kde_loss(features.cls)
        if isinstance(term, CoupledTerm)
        else gram_loss(inputs_of(batch, cls=features.cls, patches=features.patches))
    )
    (loss,) = losses.values()
    parameters = dict(model.student.backbone.named_parameters())
    expected = torch.autograd.grad(
        term.weight * loss, list(parameters.values()), materialize_grads=True
    )
    share = sum(
        (added.by_name[f"backbone.{name}"] - without.by_name[f"backbone.{name}"] - one).norm() ** 2
        for name, one in zip(parameters, expected, strict=True)
    )
    total = sum(one.norm() ** 2 for one in expected)
    assert total > 1e-4
    assert share <= 1e-8 * total + 1e-12


def inputs_of(batch: PretrainBatch, *, cls: Tensor, patches: Tensor) -> LossInputs:
    return LossInputs(
        global_crops=batch.global_crops,
        cls_tokens=cls,
        patch_tokens=patches,
        cls=None,  # type: ignore[arg-type]
        patches=None,  # type: ignore[arg-type]
        mask_weights=batch.mask_weights,
    )


class Unknown:
    """A term of no known kind."""

    weight = 1.0
    losses: Callable[..., dict[str, Tensor]] = staticmethod(kde_loss)


@pytest.mark.parametrize("num_parts", [1, 2])
def test_a_term_of_an_unknown_kind_is_no_silence(num_parts: int) -> None:
    with pytest.raises(AssertionError, match="Unknown"):
        gradients_of(Unknown(), num_parts=num_parts, koleo=None)  # type: ignore[arg-type]


@pytest.mark.parametrize("num_parts", [1, 2])
@pytest.mark.parametrize("kind", [MeanTerm, CoupledTerm])
def test_two_terms_cannot_share_a_name(kind: type, num_parts: int) -> None:
    def second(tensors: LossInputs | Tensor) -> dict[str, Tensor]:
        cls = tensors if isinstance(tensors, Tensor) else tensors.cls_tokens
        return {"koleo": cls.sum()}

    with pytest.raises(ValueError, match="two loss terms are logged as koleo"):
        gradients_of(kind(weight=1.0, losses=second), num_parts=num_parts, koleo=KoleoObjective())
