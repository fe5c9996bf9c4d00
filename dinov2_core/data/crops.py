"""Global and local crops: boxes and flips by position, colours on whole batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from dinov2_core.config.augmentation import NUM_GLOBAL_CROPS
from dinov2_core.config.augmentation import Crops as CropSettings
from dinov2_core.data.colors import (
    color_jitter,
    gaussian_blur,
    grayscale,
    normalize,
    solarize,
)
from dinov2_core.data.randomness import Stream, hashed_uniforms

_NUM_TRIES = 10
_DRAWS_PER_BOX = 2 * _NUM_TRIES + 3
_DRAWS_PER_COLOR = 13
_ASPECT_RATIO = (3 / 4, 4 / 3)
_JITTER = (0.4, 0.4, 0.2, 0.1)
_BLUR_SIGMA = (0.1, 2.0)
_BLUR_RADIUS = 4
_FULL_BLUR_SIZE = 96
_SOLARIZE_THRESHOLD = 128 / 255


@dataclass(frozen=True, slots=True, kw_only=True)
class Crops:
    """Augmented crops of B images."""

    global_crops: Tensor
    """[2B, C, H, W] float32: crop 0 of every image, then crop 1."""
    local_crops: Tensor
    """[L*B, C, h, w] float32: local crop 0 of every image, then local crop 1, and so on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CropBoxes:
    """Where the crops of B images lie, G + L crops per image, global ones first."""

    boxes: NDArray[np.int64]
    """[B, G + L, 4]: left, top, right, bottom in pixels, right and bottom exclusive."""
    is_flipped: NDArray[np.bool_]
    """[B, G + L]."""


def make_crops(
    images: Sequence[Image.Image], positions: NDArray[np.int64], *, recipe: CropSettings, seed: int
) -> Crops:
    """All crops of a rank's images, a pure function of (images, positions, recipe, seed).

    Args:
        images: B decoded images in mode `L` or `RGB`, any size.
        positions: Their positions in the run's order [B].
        recipe: What is drawn.
        seed: Of the run.
    """
    sizes = np.array([image.size for image in images], dtype=np.int64)
    boxes = crop_boxes(sizes, positions, recipe=recipe, seed=seed)
    global_pixels, local_pixels = _cut(images, boxes, recipe)
    draws = hashed_uniforms(
        _crop_positions(positions, recipe),
        seed=seed,
        stream=Stream.COLORS,
        num_draws=_DRAWS_PER_COLOR,
    )
    by_crop = torch.from_numpy(draws).float().view(len(images), recipe.num_crops, -1)
    by_crop = by_crop.transpose(0, 1)  # [G + L, B, draws]
    blur_first, blur_second, blur_local = recipe.blur_probabilities
    first = augment_colors(
        global_pixels[0],
        by_crop[0],
        recipe=recipe,
        blur_probability=blur_first,
        solarize_probability=0.0,
    )
    second = augment_colors(
        global_pixels[1],
        by_crop[1],
        recipe=recipe,
        blur_probability=blur_second,
        solarize_probability=recipe.solarize_probability,
    )
    local = augment_colors(
        local_pixels.flatten(0, 1),
        by_crop[2:].flatten(0, 1),
        recipe=recipe,
        blur_probability=blur_local,
        solarize_probability=0.0,
    )
    return Crops(global_crops=torch.cat([first, second]), local_crops=local)


def crop_boxes(
    sizes: NDArray[np.int64], positions: NDArray[np.int64], *, recipe: CropSettings, seed: int
) -> CropBoxes:
    """Boxes and flips of every crop of images of the given sizes.

    Args:
        sizes: Width and height in pixels [B, 2].
        positions: Positions in the run's order [B].
        recipe: Scales and probability of a flip.
        seed: Of the run.
    """
    draws = hashed_uniforms(
        _crop_positions(positions, recipe),
        seed=seed,
        stream=Stream.CROPS,
        num_draws=_DRAWS_PER_BOX,
    )
    num_local = recipe.num_local_crops
    scales = np.array(
        [recipe.global_crop_scale] * NUM_GLOBAL_CROPS + [recipe.local_crop_scale] * num_local
    )
    boxes = random_resized_boxes(
        np.repeat(sizes, recipe.num_crops, axis=0),
        scales=np.tile(scales, (len(positions), 1)),
        draws=draws[:, :-1],
    )
    is_flipped = draws[:, -1] < recipe.horizontal_flip_probability
    shape = (len(positions), recipe.num_crops)
    return CropBoxes(boxes=boxes.reshape(*shape, 4), is_flipped=is_flipped.reshape(shape))


def random_resized_boxes(
    sizes: NDArray[np.int64], *, scales: NDArray[np.float64], draws: NDArray[np.float64]
) -> NDArray[np.int64]:
    """Boxes of random area and aspect ratio (Inception, arXiv:1409.4842), as torchvision's.

    The first of ten tries that fits the image counts; when none fits, the largest box in the middle
    whose aspect ratio lies within 3/4 to 4/3.

    Args:
        sizes: Width and height of the image around each box [P, 2].
        scales: Smallest and largest share of the image's area [P, 2].
        draws: Uniform numbers of [0, 1): ten areas, ten aspect ratios, top, left [P, 22].

    Returns:
        Left, top, right, bottom in pixels [P, 4].
    """
    full_width, full_height = sizes[:, :1], sizes[:, 1:]  # [P, 1]
    low, high = scales[:, :1], scales[:, 1:]
    log_low, log_high = np.log(_ASPECT_RATIO)
    areas = full_width * full_height * (low + (high - low) * draws[:, :_NUM_TRIES])
    ratios = np.exp(log_low + (log_high - log_low) * draws[:, _NUM_TRIES : 2 * _NUM_TRIES])
    widths = np.rint(np.sqrt(areas * ratios)).astype(np.int64)  # [P, tries]
    heights = np.rint(np.sqrt(areas / ratios)).astype(np.int64)
    fits = (widths > 0) & (widths <= full_width) & (heights > 0) & (heights <= full_height)
    first = fits.argmax(axis=1)
    rows = np.arange(len(sizes))
    width, height = widths[rows, first], heights[rows, first]
    top = (draws[:, -2] * (sizes[:, 1] - height + 1)).astype(np.int64)
    left = (draws[:, -1] * (sizes[:, 0] - width + 1)).astype(np.int64)
    boxes = np.stack([left, top, left + width, top + height], axis=1)
    return np.where(fits.any(axis=1, keepdims=True), boxes, _central_boxes(sizes))


def augment_colors(
    pixels: Tensor,
    draws: Tensor,
    *,
    recipe: CropSettings,
    blur_probability: float,
    solarize_probability: float,
) -> Tensor:
    """Jitter, grayscale, blur, solarise and normalise crops, each image by its own draws.

    The window (9 pixels) and deviation (0.1 to 2 pixels) of the blur are the reference's for crops
    of 96 pixels and more and shrink in proportion below, where they would wipe out a small crop.

    Args:
        pixels: [P, C, S, S] uint8.
        draws: Uniform numbers [P, 13].
        recipe: Probabilities of jitter and grayscale, mean and deviation.
        blur_probability: Of the blur.
        solarize_probability: Of inverting the bright half.

    Returns:
        [P, C, S, S] float32.
    """
    images = pixels.float().div_(255)
    jittered = _chosen(draws[:, 0], recipe.color_jitter_probability)
    if len(jittered):
        images[jittered] = color_jitter(
            images[jittered],
            factors=_jitter_factors(draws[jittered, 1:5]),
            order=draws[jittered, 5:9].argsort(dim=1),
        )
    gray = _chosen(draws[:, 9], recipe.grayscale_probability)
    if len(gray):
        images[gray] = grayscale(images[gray])
    blurred = _chosen(draws[:, 10], blur_probability)
    if len(blurred):
        shrink = min(1.0, images.shape[-1] / _FULL_BLUR_SIZE)
        low, high = _BLUR_SIGMA
        images[blurred] = gaussian_blur(
            images[blurred],
            shrink * (low + (high - low) * draws[blurred, 11]),
            kernel_size_pixels=2 * max(1, round(_BLUR_RADIUS * shrink)) + 1,
        )
    inverted = _chosen(draws[:, 12], solarize_probability)
    if len(inverted):
        images[inverted] = solarize(images[inverted], threshold=_SOLARIZE_THRESHOLD)
    return normalize(
        images,
        mean=torch.tensor(recipe.mean),
        standard_deviation=torch.tensor(recipe.standard_deviation),
    )


def _jitter_factors(draws: Tensor) -> Tensor:
    """Brightness, contrast, saturation around 1 and hue around 0, from uniform numbers [P, 4]."""
    centre = torch.tensor((1.0, 1.0, 1.0, 0.0))
    return centre + torch.tensor(_JITTER) * (2 * draws - 1)


def _chosen(draws: Tensor, probability: float) -> Tensor:
    return (draws < probability).nonzero().flatten()


def _crop_positions(positions: NDArray[np.int64], recipe: CropSettings) -> NDArray[np.int64]:
    """One number for every crop of every image, [B * (G + L)]."""
    return (positions[:, None] * recipe.num_crops + np.arange(recipe.num_crops)).ravel()


def _central_boxes(sizes: NDArray[np.int64]) -> NDArray[np.int64]:
    full_width, full_height = sizes[:, 0], sizes[:, 1]
    low, high = _ASPECT_RATIO
    width = np.minimum(full_width, np.rint(full_height * high)).astype(np.int64)
    height = np.minimum(full_height, np.rint(full_width / low)).astype(np.int64)
    left, top = (full_width - width) // 2, (full_height - height) // 2
    return np.stack([left, top, left + width, top + height], axis=1)


def _cut(
    images: Sequence[Image.Image], crops: CropBoxes, recipe: CropSettings
) -> tuple[Tensor, Tensor]:
    """Global [2, B, C, S, S] and local [L, B, C, s, s] pixels, resized with antialiasing, uint8."""
    num_images, channels = len(images), recipe.num_channels
    large, small = recipe.global_crop_size_pixels, recipe.local_crop_size_pixels
    outputs = [
        np.empty((NUM_GLOBAL_CROPS, num_images, large, large, channels), dtype=np.uint8),
        np.empty((recipe.num_local_crops, num_images, small, small, channels), dtype=np.uint8),
    ]
    boxes, flips = crops.boxes.tolist(), crops.is_flipped.tolist()
    for number, image in enumerate(images):
        for crop, (box, is_flipped) in enumerate(zip(boxes[number], flips[number], strict=True)):
            is_local = crop >= NUM_GLOBAL_CROPS
            size = small if is_local else large
            resized = image.resize((size, size), Image.Resampling.BICUBIC, box=tuple(box))
            pixels = np.asarray(resized).reshape(size, size, -1)
            target = outputs[is_local][crop - NUM_GLOBAL_CROPS * is_local, number]
            target[:] = pixels[:, ::-1] if is_flipped else pixels
    first, second = (torch.from_numpy(output).permute(0, 1, 4, 2, 3) for output in outputs)
    return first, second
