"""How an encoded image becomes the normalised tensor on which features are measured."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from dinov2_core.data.decoding import open_image
from dinov2_core.errors import InputError, ObjectUnreadable, UnreadableImage
from dinov2_core.evaluation.labelled_set import EncodedImage

MAX_ASPECT = 16
"""Longer over shorter side above which the ends, which the centre crop drops, are cut off first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Preprocessing:
    """Resize the shorter side, crop the centre, normalise; arXiv:2304.07193 measures so."""

    size_pixels: int
    """Side of the square that the backbone sees."""
    mean: tuple[float, ...]
    """Subtracted per channel from values in [0, 1]; one value for grey images, three for RGB."""
    standard_deviation: tuple[float, ...]
    """Divides per channel after the mean is subtracted; > 0."""

    def __post_init__(self) -> None:
        if self.size_pixels < 1:
            raise ValueError(f"size_pixels {self.size_pixels} must be at least 1")
        if len(self.mean) not in (1, 3) or len(self.mean) != len(self.standard_deviation):
            raise ValueError(
                f"mean has {len(self.mean)} values and standard_deviation "
                f"{len(self.standard_deviation)}; give one value each for grey images or three "
                "for RGB"
            )
        if min(self.standard_deviation) <= 0:
            raise ValueError(
                f"standard_deviation {self.standard_deviation} must be positive in every channel"
            )

    @property
    def num_channels(self) -> int:
        """Channels of the tensor, one for grey and three for RGB."""
        return len(self.mean)

    @property
    def resize_pixels(self) -> int:
        """Shorter side before the crop, in the usual proportion of 256 to 224."""
        return round(self.size_pixels * 256 / 224)


def decode(encoded: EncodedImage, *, num_channels: int) -> Image.Image:
    """Decode an image file to 8-bit grey (1 channel) or RGB (3), upright, as training does.

    Raises:
        InputError: The file is no readable image; the message names it.
    """
    try:
        image = open_image(encoded.read(), num_channels=num_channels)
    except (UnreadableImage, ObjectUnreadable) as error:
        raise InputError(
            f"image {encoded.name} cannot be decoded ({error}); replace it by a whole image file "
            "or remove it from the labelled set"
        ) from error
    return image.convert("L" if num_channels == 1 else "RGB")


def resize_and_crop(image: Image.Image, *, preprocessing: Preprocessing) -> NDArray[np.uint8]:
    """Resize the shorter side (bicubic, antialiased) and cut the square in the centre.

    An image whose shorter side is at most size_pixels is resized to exactly that, so that a small
    image loses nothing to the crop beyond its longer side. Memory is bounded by
    `MAX_ASPECT`: what lies far from the centre is cut off first.

    Returns:
        Pixels [S, S, C], uint8.
    """
    size = preprocessing.size_pixels
    image = _without_far_ends(image)
    width, height = image.size
    shorter = min(width, height)
    target = size if shorter <= size else preprocessing.resize_pixels
    if shorter != target:
        width, height = int(target * width / shorter), int(target * height / shorter)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = round((width - size) / 2), round((height - size) / 2)
    pixels = np.asarray(image.crop((left, top, left + size, top + size)))
    return pixels.reshape(size, size, preprocessing.num_channels)


def _without_far_ends(image: Image.Image) -> Image.Image:
    """The middle of an image so long that resizing it whole would fill the memory."""
    width, height = image.size
    longest = MAX_ASPECT * min(width, height)
    if max(width, height) <= longest:
        return image
    left, top = max(width - longest, 0) // 2, max(height - longest, 0) // 2
    return image.crop((left, top, left + min(width, longest), top + min(height, longest)))


def normalise(pixels: NDArray[np.uint8], *, preprocessing: Preprocessing) -> Tensor:
    """Scale pixels [B, H, W, C] to [0, 1], subtract the mean, divide: [B, C, H, W], float32."""
    images = torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))).float() / 255
    mean = torch.tensor(preprocessing.mean).view(1, -1, 1, 1)
    deviation = torch.tensor(preprocessing.standard_deviation).view(1, -1, 1, 1)
    return (images - mean) / deviation


def denormalise(images: Tensor, *, preprocessing: Preprocessing) -> NDArray[np.uint8]:
    """Undo `normalise`, to show what the backbone saw: [B, C, H, W] to uint8 [B, H, W, C]."""
    mean = torch.tensor(preprocessing.mean).view(1, -1, 1, 1)
    deviation = torch.tensor(preprocessing.standard_deviation).view(1, -1, 1, 1)
    pixels = ((images.cpu() * deviation + mean) * 255).round().clamp(0, 255).to(torch.uint8)
    shown: NDArray[np.uint8] = pixels.permute(0, 2, 3, 1).contiguous().numpy()
    return shown


def preprocessed_batches(
    images: Sequence[EncodedImage],
    *,
    preprocessing: Preprocessing,
    batch_size: int,
    num_threads: int = 2,
) -> Iterator[Tensor]:
    """Yield normalised images [B, C, S, S] in order; threads decode one batch ahead.

    Args:
        images: Files to decode.
        preprocessing: Size and normalisation.
        batch_size: Images per batch; the last batch may be smaller.
        num_threads: Decoding threads.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size {batch_size} must be at least 1")

    def pixels(encoded: EncodedImage) -> NDArray[np.uint8]:
        image = decode(encoded, num_channels=preprocessing.num_channels)
        return resize_and_crop(image, preprocessing=preprocessing)

    starts = range(0, len(images), batch_size)
    with ThreadPoolExecutor(max_workers=num_threads) as pool:
        ahead = iter(())  # type: Iterator[NDArray[np.uint8]]
        for index, start in enumerate(starts):
            current = ahead if index else pool.map(pixels, images[start : start + batch_size])
            following = start + batch_size
            ahead = pool.map(pixels, images[following : following + batch_size])
            yield normalise(np.stack(list(current)), preprocessing=preprocessing)
