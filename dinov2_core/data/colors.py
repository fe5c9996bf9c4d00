"""Colour operations on batches of crops, each image with its own strength."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

_LUMINANCE = (0.299, 0.587, 0.114)
_NUM_JITTERS = 4


def color_jitter(images: Tensor, *, factors: Tensor, order: Tensor) -> Tensor:
    """Brightness, contrast, saturation and hue, in an order of each image's own.

    Images with other than 3 channels have no colours: only brightness and contrast touch them.

    Args:
        images: [P, C, H, W] in [0, 1].
        factors: [P, 4] for brightness, contrast, saturation (1 changes nothing) and hue (0 changes
            nothing, 1 is the full circle).
        order: [P, 4] int64, a permutation of 0..3 per image: which operation comes when.

    Returns:
        [P, C, H, W] in [0, 1], new memory.
    """
    operations = (adjust_brightness, adjust_contrast, adjust_saturation, adjust_hue)
    available = operations if images.shape[1] == 3 else operations[:2]
    images = images.clone()
    for turn in range(_NUM_JITTERS):
        for number, operation in enumerate(available):
            chosen = (order[:, turn] == number).nonzero().flatten()
            if len(chosen):
                images[chosen] = operation(images[chosen], factors[chosen, number])
    return images


def adjust_brightness(images: Tensor, factors: Tensor) -> Tensor:
    """Multiply [P, C, H, W] by factors [P]; 0 is black."""
    return (images * _per_image(factors)).clamp_(0, 1)


def adjust_contrast(images: Tensor, factors: Tensor) -> Tensor:
    """Blend [P, C, H, W] with its mean luminance (mean over channels if C is not 3) by [P]."""
    mean = _luminance(images).mean(dim=(-2, -1), keepdim=True)  # [P, 1, 1, 1]
    return _blend(images, mean, factors)


def adjust_saturation(images: Tensor, factors: Tensor) -> Tensor:
    """Blend [P, 3, H, W] with its luminance by factors [P]; 0 is gray."""
    return _blend(images, _luminance(images), factors)


def adjust_hue(images: Tensor, factors: Tensor) -> Tensor:
    """Turn the hue of [P, 3, H, W] by factors [P], as shares of the colour circle."""
    red, green, blue = images.unbind(dim=1)  # [P, H, W]
    largest = images.amax(dim=1)
    chroma = largest - images.amin(dim=1)
    divisor = torch.where(chroma == 0, torch.ones_like(chroma), chroma)
    hue = torch.where(
        largest == red,
        (green - blue) / divisor,
        torch.where(largest == green, 2 + (blue - red) / divisor, 4 + (red - green) / divisor),
    )  # sextants of the circle
    hue = hue + 6 * factors[:, None, None]
    # HSV to RGB without cases: V - chroma * clamp(min(k, 4 - k), 0, 1) with k = n + hue mod 6.
    offsets = torch.tensor((5.0, 3.0, 1.0), device=images.device)[:, None, None]
    k = torch.remainder(hue[:, None] + offsets, 6)  # [P, 3, H, W]
    return largest[:, None] - chroma[:, None] * torch.minimum(k, 4 - k).clamp_(0, 1)


def grayscale(images: Tensor) -> Tensor:
    """Luminance of [P, 3, H, W] in all three channels; other images have no colours to drop."""
    return _luminance(images).expand_as(images) if images.shape[1] == 3 else images


def gaussian_blur(images: Tensor, sigmas: Tensor, *, kernel_size_pixels: int) -> Tensor:
    """Blur [P, C, H, W] with standard deviations [P] in pixels; edges are mirrored.

    Args:
        images: [P, C, H, W].
        sigmas: [P], > 0.
        kernel_size_pixels: Odd width of the window; its half must be less than H and W.
    """
    radius = kernel_size_pixels // 2
    offsets = torch.arange(-radius, radius + 1, device=images.device, dtype=images.dtype)
    taps = torch.softmax(-0.5 * (offsets / sigmas[:, None]) ** 2, dim=1)  # [P, kernel]
    height, width = images.shape[-2:]
    padded = functional.pad(images, (radius, radius, radius, radius), mode="reflect")
    rows = _weighted(padded, taps, length=width, dim=3)
    return _weighted(rows, taps, length=height, dim=2)


def solarize(images: Tensor, *, threshold: float) -> Tensor:
    """Invert the values of [P, C, H, W] that are at least the threshold."""
    return torch.where(images >= threshold, 1 - images, images)


def normalize(images: Tensor, *, mean: Tensor, standard_deviation: Tensor) -> Tensor:
    """Subtract mean [C] from [P, C, H, W] and divide by the standard deviation [C], in place."""
    return images.sub_(mean[:, None, None]).div_(standard_deviation[:, None, None])


def _weighted(images: Tensor, taps: Tensor, *, length: int, dim: int) -> Tensor:
    """Sum of shifted views, tap by tap: faster than a grouped convolution with own kernels."""
    total = images.narrow(dim, 0, length) * _per_image(taps[:, 0])
    for shift in range(1, taps.shape[1]):
        total.addcmul_(images.narrow(dim, shift, length), _per_image(taps[:, shift]))
    return total


def _luminance(images: Tensor) -> Tensor:
    if images.shape[1] != 3:
        return images.mean(dim=1, keepdim=True)
    red, green, blue = images[:, :1], images[:, 1:2], images[:, 2:]
    return (red * _LUMINANCE[0]).add_(green, alpha=_LUMINANCE[1]).add_(blue, alpha=_LUMINANCE[2])


def _blend(images: Tensor, other: Tensor, factors: Tensor) -> Tensor:
    strength = _per_image(factors)
    return (images * strength + other * (1 - strength)).clamp_(0, 1)


def _per_image(values: Tensor) -> Tensor:
    return values[:, None, None, None]
