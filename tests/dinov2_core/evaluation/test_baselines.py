"""Baselines that are measured like the teacher."""

from __future__ import annotations

import torch
from torch import nn

from dinov2_core.evaluation.baselines import raw_pixels, untrained
from dinov2_core.evaluation.features import extract_features


def test_raw_pixels_are_the_images_values() -> None:
    images = torch.randn(4, 3, 5, 6)
    found = extract_features(
        raw_pixels, batches=[images], total=4, device=torch.device("cpu"), has_patch_mean=True
    )
    assert torch.equal(found.cls, images.reshape(4, 90))
    torch.testing.assert_close(found.patch_mean, images.mean(dim=(2, 3)))
    assert raw_pixels(images).patches.shape == (4, 30, 3)


def test_untrained_weights_follow_the_seed_alone() -> None:
    def build() -> nn.Linear:
        return nn.Linear(4, 4)

    before = torch.random.get_rng_state()
    first, second, other = (
        untrained(build, seed=1),
        untrained(build, seed=1),
        untrained(build, seed=2),
    )
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(first.weight, second.weight)
    assert not torch.equal(first.weight, other.weight)
    assert not first.training
    assert not any(parameter.requires_grad for parameter in first.parameters())
