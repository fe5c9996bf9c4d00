"""accumulation: parts of a batch give the whole batch's gradients, dropped paths included.

Sharded and on two ranks: tests/dinov2_core/distributed/test_sharding.py.
"""

from __future__ import annotations

import pytest
import torch

from dinov2_core.config.backbone import Backbone, Dimensions
from dinov2_core.config.objectives import DinoObjective, Head, IbotObjective
from dinov2_core.config.training import Crops, TrainingConfig
from dinov2_core.data.batch import PretrainBatch
from dinov2_core.losses.terms import CoupledTerm
from dinov2_core.training.accumulation import accumulate_gradients
from dinov2_core.training.student_teacher import StudentTeacher

HEAD = Head(num_prototypes=24, bottleneck_dim=8, hidden_dim=16)
NUM_IMAGES, NUM_PARTS = 8, 2


def make_model(*, drop_path_rate: float) -> StudentTeacher:
    config = TrainingConfig(
        backbone=Backbone(
            architecture=Dimensions(embed_dim=16, depth=2, num_heads=2),
            patch_size_pixels=4,
            layer_scale=0.3,
            drop_path_rate=drop_path_rate,
        ),
        crops=Crops(global_crop_size_pixels=8, local_crop_size_pixels=4, num_local_crops=2),
        dino=DinoObjective(head=HEAD),
        ibot=IbotObjective(head=HEAD),
        precision="fp32",
    )
    model = StudentTeacher(config, image_size_pixels=8).train()
    model.init_weights(torch.Generator().manual_seed(0))
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


def test_the_second_pass_drops_the_paths_of_the_first() -> None:
    """Against one graph over all parts, whose KoLeo sees the same dropped paths."""
    parts = make_batch().split(NUM_PARTS)
    model, other = (make_model(drop_path_rate=0.4) for _ in range(2))
    torch.manual_seed(0)
    losses = accumulate_gradients(model, parts, teacher_temperature=0.05)

    torch.manual_seed(0)
    targets = other.teacher_targets(parts, temperature=0.05)
    dino, koleo, ibot = other.terms
    assert isinstance(koleo, CoupledTerm)
    cls: list[torch.Tensor] = []

    def noted(tokens: torch.Tensor) -> dict[str, torch.Tensor]:
        cls.append(tokens)
        return {"koleo": tokens.sum() * 0}

    other.terms = (dino, CoupledTerm(weight=1.0, losses=noted), ibot)
    total = torch.zeros(())
    for part, own in zip(parts, targets.split(parts), strict=True):
        total = total + other(part, targets=own).objective / NUM_PARTS
    crops = [tokens.chunk(2)[crop] for crop in (0, 1) for tokens in cls]
    total = total + koleo.weight * koleo.losses(torch.cat(crops))["koleo"]
    total.backward()  # type: ignore[no-untyped-call]
    assert losses.total.item() == pytest.approx(total.item(), rel=1e-6)
    assert losses.terms["koleo"] != 0
    for one, expected in zip(model.student.parameters(), other.student.parameters(), strict=True):
        assert one.grad is not None and expected.grad is not None
        assert (one.grad - expected.grad).norm() <= 1e-5 * expected.grad.norm()


def test_one_part_is_a_plain_step() -> None:
    batch, events = make_batch(), []
    model, other = (make_model(drop_path_rate=0.0) for _ in range(2))
    losses = accumulate_gradients(
        model, [batch], teacher_temperature=0.05, before_backward=lambda: events.append(1)
    )
    targets = other.teacher_targets([batch], temperature=0.05)
    expected = other(batch, targets=targets)
    expected.objective.backward()
    assert events == [1]
    assert torch.equal(losses.total, expected.objective)
    assert losses.terms == expected.by_name
    for one, plain in zip(model.student.parameters(), other.student.parameters(), strict=True):
        assert one.grad is not None and plain.grad is not None
        assert torch.equal(one.grad, plain.grad)
