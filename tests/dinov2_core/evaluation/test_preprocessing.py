"""Decoding, resizing and normalising of evaluated images."""

from __future__ import annotations

import io
import resource
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import functional as reference

from dinov2_core.errors import InputError, ObjectUnreadable
from dinov2_core.evaluation.labelled_set import EncodedImage
from dinov2_core.evaluation.preprocessing import (
    Preprocessing,
    decode,
    denormalise,
    normalise,
    preprocessed_batches,
    resize_and_crop,
)

COLOUR = Preprocessing(
    size_pixels=28, mean=(0.485, 0.456, 0.406), standard_deviation=(0.229, 0.224, 0.225)
)
GREY = Preprocessing(size_pixels=14, mean=(0.3,), standard_deviation=(0.5,))


def picture(width: int, height: int, *, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pixels)


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize("size", [(60, 40), (40, 61), (100, 33), (29, 29)])
def test_large_images_are_resized_and_cropped_as_by_torchvision(size: tuple[int, int]) -> None:
    image = picture(*size)
    mode = reference.InterpolationMode.BICUBIC
    expected = reference.center_crop(reference.resize(image, [32], mode), [28])
    np.testing.assert_array_equal(resize_and_crop(image, preprocessing=COLOUR), expected)


def test_an_image_of_the_right_size_is_untouched() -> None:
    image = picture(28, 28)
    np.testing.assert_array_equal(resize_and_crop(image, preprocessing=COLOUR), image)


@pytest.mark.parametrize("size", [(14, 14), (20, 14), (28, 40)])
def test_small_images_grow_to_the_size_itself(size: tuple[int, int]) -> None:
    image = picture(*size)
    mode = reference.InterpolationMode.BICUBIC
    expected = reference.center_crop(reference.resize(image, [28], mode), [28])
    np.testing.assert_array_equal(resize_and_crop(image, preprocessing=COLOUR), expected)


def test_normalising_equals_torchvision_and_is_undone() -> None:
    image = picture(28, 28)
    pixels = np.asarray(image)[None]
    images = normalise(pixels, preprocessing=COLOUR)
    expected = reference.normalize(
        reference.to_tensor(image), list(COLOUR.mean), list(COLOUR.standard_deviation)
    )
    torch.testing.assert_close(images[0], expected)
    np.testing.assert_array_equal(denormalise(images, preprocessing=COLOUR), pixels)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 5, 8])
def test_batches_keep_order_and_number(tmp_path: Path, batch_size: int) -> None:
    images = []
    for index in range(5):
        path = tmp_path / f"{index}.png"
        path.write_bytes(png(Image.new("L", (14, 14), 40 * index)))
        images.append(EncodedImage(name=str(path), content=path.read_bytes))
    batches = list(preprocessed_batches(images, preprocessing=GREY, batch_size=batch_size))
    assert [len(batch) for batch in batches[:-1]] == [batch_size] * (len(batches) - 1)
    together = torch.cat(batches)
    assert together.shape == (5, 1, 14, 14)
    expected = (torch.arange(5) * 40 / 255 - 0.3) / 0.5
    torch.testing.assert_close(together.mean(dim=(1, 2, 3)), expected)


def test_no_images_give_no_batches() -> None:
    assert not list(preprocessed_batches([], preprocessing=GREY, batch_size=4))


def test_channels_follow_the_normalisation() -> None:
    content = png(picture(20, 20))
    assert decode(EncodedImage(name="a", content=content), num_channels=1).mode == "L"
    grey = EncodedImage(name="a", content=png(picture(20, 20).convert("L")))
    assert decode(grey, num_channels=3).mode == "RGB"


def test_a_broken_image_is_named() -> None:
    def unreadable() -> bytes:
        raise ObjectUnreadable("6000000000 bytes are too many")

    for content in (png(picture(9, 9))[:60], b"", unreadable):
        encoded = EncodedImage(name="set.parquet#7", content=content)
        with pytest.raises(InputError, match=r"set\.parquet#7 cannot be decoded"):
            list(preprocessed_batches([encoded], preprocessing=GREY, batch_size=1))


@pytest.mark.parametrize("size", [(8000, 1), (1, 8000), (30_000, 20)])
def test_a_thin_image_takes_little_memory(size: tuple[int, int]) -> None:
    """Resized whole, 8000 x 1 pixels would become 1,792,000 x 224 of them: 1.2 GB."""
    image = picture(*size)
    large = replace(COLOUR, size_pixels=224)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    pixels = resize_and_crop(image, preprocessing=large)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kibibytes
    assert pixels.shape == (224, 224, 3)


def test_only_ends_far_from_the_centre_are_cut_off() -> None:
    """One gray value for each half: the border stays in the middle."""
    for width, height in ((640, 20), (20, 640), (6400, 20), (20, 6400)):
        image = Image.new("RGB", (width, height), (50, 50, 50))
        image.paste(
            (200, 200, 200),
            (width // 2 * (width > height), height // 2 * (height > width), width, height),
        )
        pixels = resize_and_crop(image, preprocessing=COLOUR)
        halves = pixels if width > height else pixels.transpose(1, 0, 2)
        np.testing.assert_array_equal(halves[:, :8], 50)
        np.testing.assert_array_equal(halves[:, -8:], 200)


@pytest.mark.parametrize(
    ("size_pixels", "mean", "deviation", "reason"),
    [
        (0, (0.5,), (0.5,), "size_pixels 0"),
        (28, (0.5, 0.5), (0.5, 0.5), "mean has 2 values"),
        (28, (0.5,), (0.5, 0.5, 0.5), "standard_deviation 3"),
        (28, (0.5,), (0.0,), "must be positive"),
    ],
)
def test_impossible_settings_are_refused(
    size_pixels: int, mean: tuple[float, ...], deviation: tuple[float, ...], reason: str
) -> None:
    with pytest.raises(ValueError, match=reason):
        Preprocessing(size_pixels=size_pixels, mean=mean, standard_deviation=deviation)


def test_a_batch_has_at_least_one_image() -> None:
    with pytest.raises(ValueError, match="batch_size 0"):
        list(preprocessed_batches([], preprocessing=GREY, batch_size=0))
