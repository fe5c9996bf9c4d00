"""colors: every operation against torchvision's, image by image."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from torchvision.transforms.v2 import functional as reference

from dinov2_core.data import colors


@pytest.fixture
def images() -> Tensor:
    made = torch.rand(24, 3, 20, 16, generator=torch.Generator().manual_seed(0))
    made[0] = 0.5
    made[1] = 0
    made[2, 1] = made[2, 0]
    return made


@pytest.fixture
def factors() -> Tensor:
    return torch.linspace(0.6, 1.4, 24)


def test_brightness(images: Tensor, factors: Tensor) -> None:
    expected = [
        reference.adjust_brightness(i, f.item()) for i, f in zip(images, factors, strict=True)
    ]
    assert_close(colors.adjust_brightness(images, factors), torch.stack(expected))


def test_contrast(images: Tensor, factors: Tensor) -> None:
    expected = [
        reference.adjust_contrast(i, f.item()) for i, f in zip(images, factors, strict=True)
    ]
    # torchvision rounds the luminance weights to .2989, .587, .114.
    assert_close(colors.adjust_contrast(images, factors), torch.stack(expected), atol=2e-4, rtol=0)


def test_saturation(images: Tensor, factors: Tensor) -> None:
    expected = [
        reference.adjust_saturation(i, f.item()) for i, f in zip(images, factors, strict=True)
    ]
    assert_close(
        colors.adjust_saturation(images, factors), torch.stack(expected), atol=2e-4, rtol=0
    )


def test_hue(images: Tensor) -> None:
    turns = torch.linspace(-0.5, 0.5, 24)
    expected = [reference.adjust_hue(i, t.item()) for i, t in zip(images, turns, strict=True)]
    assert_close(colors.adjust_hue(images, turns), torch.stack(expected), atol=1e-5, rtol=0)


def test_grayscale(images: Tensor) -> None:
    expected = reference.rgb_to_grayscale(images, num_output_channels=3)
    assert_close(colors.grayscale(images), expected, atol=2e-4, rtol=0)


@pytest.mark.parametrize("kernel_size", [3, 9])
def test_gaussian_blur(images: Tensor, kernel_size: int) -> None:
    sigmas = torch.linspace(0.1, 2, 24)
    expected = [
        reference.gaussian_blur(i, [kernel_size] * 2, [s.item()] * 2)
        for i, s in zip(images, sigmas, strict=True)
    ]
    made = colors.gaussian_blur(images, sigmas, kernel_size_pixels=kernel_size)
    assert_close(made, torch.stack(expected), atol=1e-6, rtol=1e-5)


def test_solarize_on_8_bit_values() -> None:
    values = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    expected = reference.solarize(values, 128).float() / 255
    assert_close(colors.solarize(values.float() / 255, threshold=128 / 255), expected)


def test_normalize(images: Tensor) -> None:
    mean, deviation = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    expected = reference.normalize(images, mean, deviation)
    made = colors.normalize(
        images.clone(), mean=torch.tensor(mean), standard_deviation=torch.tensor(deviation)
    )
    assert_close(made, expected)


def test_jitter_applies_each_image_its_own_order() -> None:
    orders = torch.tensor(list(itertools.permutations(range(4))))
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(24, 3, 8, 8, generator=generator)
    factors = torch.rand(24, 4, generator=generator) * 0.8 + torch.tensor([0.6, 0.6, 0.6, -0.4])
    made = colors.color_jitter(images, factors=factors, order=orders)
    operations = (
        reference.adjust_brightness,
        reference.adjust_contrast,
        reference.adjust_saturation,
        reference.adjust_hue,
    )
    for number in range(24):
        expected = images[number]
        for operation in orders[number].tolist():
            strength = factors[number, operation].item()
            if operation == 3:
                strength = max(-0.5, min(0.5, strength))
            expected = operations[operation](expected, strength)
        assert_close(made[number], expected, atol=2e-3, rtol=0)


@pytest.mark.parametrize("channels", [1, 5])
def test_other_channel_counts_have_brightness_and_contrast_only(channels: int) -> None:
    images = torch.rand(6, channels, 8, 8, generator=torch.Generator().manual_seed(2))
    order = torch.arange(4).expand(6, 4)
    factors = torch.tensor([1.2, 0.7, 0.1, 0.4]).expand(6, 4)
    bright = (images * 1.2).clamp(0, 1)
    mean = bright.mean(dim=(1, 2, 3), keepdim=True)
    expected = (0.7 * bright + 0.3 * mean).clamp(0, 1)
    assert_close(colors.color_jitter(images, factors=factors, order=order), expected)
    assert colors.grayscale(images) is images
