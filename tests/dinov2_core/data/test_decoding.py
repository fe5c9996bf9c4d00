"""decoding: many encodings, one array; damage has a reason."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from dinov2_core.data.decoding import (
    decode_image,
    image_format,
    open_image,
    strips,
)
from dinov2_core.errors import UnreadableImage


def encoded(image: Image.Image, file_format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=file_format, **options)
    return buffer.getvalue()


@pytest.fixture
def colours() -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (9, 13, 3), dtype=np.uint8)


@pytest.mark.parametrize("file_format", ["PNG", "BMP", "TIFF", "PPM"])
def test_lossless_formats_give_the_pixels_back(
    colours: NDArray[np.uint8], file_format: str
) -> None:
    content = encoded(Image.fromarray(colours), file_format)
    assert np.array_equal(decode_image(content, num_channels=3), colours)


@pytest.mark.parametrize("file_format", ["JPEG", "WEBP", "GIF", "JPEG2000"])
def test_other_formats_give_the_size_and_nearly_the_pixels(file_format: str) -> None:
    ramp = np.linspace(0, 255, 64 * 48).reshape(48, 64).astype(np.uint8)
    content = encoded(Image.fromarray(ramp).convert("RGB"), file_format)
    pixels = decode_image(content, num_channels=3)
    assert pixels.shape == (48, 64, 3)
    assert np.abs(pixels.astype(int) - ramp[:, :, None]).mean() < 4
    assert image_format(content) == file_format.lower()


def test_one_channel_is_luminance(colours: NDArray[np.uint8]) -> None:
    pixels = decode_image(encoded(Image.fromarray(colours), "PNG"), num_channels=1)
    expected = colours @ np.array([0.299, 0.587, 0.114])
    assert np.abs(pixels[:, :, 0] - expected).max() <= 1


def test_gray_becomes_three_equal_channels(colours: NDArray[np.uint8]) -> None:
    content = encoded(Image.fromarray(colours[:, :, 0]), "PNG")
    pixels = decode_image(content, num_channels=3)
    assert np.array_equal(pixels, np.repeat(colours[:, :, :1], 3, axis=2))
    assert open_image(content, num_channels=3).mode == "L"


@pytest.mark.parametrize("file_format", ["PNG", "TIFF"])
def test_16_bit_gray_is_scaled(file_format: str) -> None:
    values = np.array([[0, 257, 32_896], [65_535, 128, 129]], dtype=np.uint16)
    pixels = decode_image(encoded(Image.fromarray(values), file_format), num_channels=1)
    assert pixels[:, :, 0].tolist() == [[0, 1, 128], [255, 0, 1]]


def test_floats_are_stretched() -> None:
    values = np.array([[-1.0, 0.0, 1.0]], dtype=np.float32)
    pixels = decode_image(encoded(Image.fromarray(values), "TIFF"), num_channels=1)
    assert pixels[0, :, 0].tolist() == [0, 128, 255]


def test_palette_and_cmyk_become_colours() -> None:
    red = Image.new("RGB", (4, 4), (255, 0, 0))
    assert decode_image(encoded(red.convert("P"), "PNG"), num_channels=3)[0, 0].tolist()[0] > 250
    cmyk = decode_image(encoded(red.convert("CMYK"), "TIFF"), num_channels=3)
    assert cmyk[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_is_laid_over_white(mode: str) -> None:
    image = Image.new("RGBA", (2, 2), (0, 0, 0, 0))
    image.putpixel((0, 0), (0, 0, 0, 255))
    pixels = decode_image(encoded(image.convert(mode), "PNG"), num_channels=3)
    assert pixels[0, 0].tolist() == [0, 0, 0]
    assert pixels[1, 1].tolist() == [255, 255, 255]


def test_transparent_palette_entry_is_white() -> None:
    image = Image.new("P", (2, 1), 0)
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((1, 0), 1)
    pixels = decode_image(encoded(image, "PNG", transparency=0), num_channels=3)
    assert pixels[0].tolist() == [[255, 255, 255], [40, 50, 60]]


def test_images_of_many_strips_equal_those_of_one() -> None:
    rng = np.random.default_rng(0)
    wide = rng.integers(0, 65536, (2100, 1000), dtype=np.uint16)
    made = open_image(encoded(Image.fromarray(wide), "PNG"), num_channels=1)
    assert np.array_equal(np.asarray(made), np.rint(wide / 257))
    clear = Image.fromarray(rng.integers(0, 256, (2100, 1000, 4), dtype=np.uint8))
    white = Image.new("RGBA", clear.size, "white")
    expected = np.asarray(Image.alpha_composite(white, clear).convert("RGB"))
    made = open_image(encoded(clear, "PNG", compress_level=1), num_channels=3)
    assert np.array_equal(np.asarray(made), expected)
    assert [top for top, _ in strips(clear)] == [0, 1048, 2096]


def test_exif_orientation_is_applied(colours: NDArray[np.uint8]) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    content = encoded(Image.fromarray(colours), "PNG", exif=exif)
    assert np.array_equal(decode_image(content, num_channels=3), np.rot90(colours, -1))


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_cut_off_files_are_refused(file_format: str) -> None:
    noise = np.random.default_rng(1).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    content = encoded(Image.fromarray(noise), file_format)
    with pytest.raises(UnreadableImage) as caught:
        decode_image(content[: len(content) // 2], num_channels=3)
    assert caught.value.reason in ("truncated", "unreadable")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty"),
        (b"hello, I am a text", "not_an_image"),
        (b"<!DOCTYPE html><html></html>", "not_an_image"),
        (bytes(1000), "not_an_image"),
    ],
)
def test_other_bytes_are_refused_with_a_reason(content: bytes, reason: str) -> None:
    with pytest.raises(UnreadableImage) as caught:
        open_image(content, num_channels=3)
    assert caught.value.reason == reason


def test_too_many_pixels_are_refused_unread() -> None:
    content = encoded(Image.new("1", (300, 300)), "PNG")
    with pytest.raises(UnreadableImage, match="300 x 300 is more than max_pixels 1000"):
        open_image(content, num_channels=1, max_pixels=1000)
    with pytest.raises(UnreadableImage) as caught:
        open_image(encoded(Image.new("1", (20_000, 20_000)), "PNG"), num_channels=1)
    assert caught.value.reason == "too_many_pixels"


def test_two_channels_are_refused() -> None:
    with pytest.raises(ValueError, match="num_channels 2 cannot be decoded; choose 1"):
        open_image(b"", num_channels=2)
