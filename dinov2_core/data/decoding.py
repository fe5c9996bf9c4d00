"""Encoded bytes of any common image format to 8-bit gray or colour pixels."""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from dinov2_core.errors import UnreadableImage

DecodingFailure = Literal["empty", "not_an_image", "truncated", "unreadable", "too_many_pixels"]

MAX_PIXELS = 89_478_485
"""Pixels above which an image is refused unread: a quarter of a gibibyte as 24-bit colour."""

_FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "GIF", "BMP", "DIB", "PPM", "JPEG2000", "AVIF", "ICO")
# What Pillow raises for damaged files differs between its decoders.
_DAMAGE = (
    OSError,
    EOFError,
    ValueError,
    SyntaxError,
    TypeError,
    IndexError,
    KeyError,
    struct.error,
    RuntimeError,  # the AVIF decoder's
)


_STRIP_PIXELS = 2**20

Image.init()  # later, several threads would load the decoders at once


def decode_image(
    content: bytes, *, num_channels: int, max_pixels: int = MAX_PIXELS
) -> NDArray[np.uint8]:
    """Pixels of an encoded image, upright.

    Args:
        content: The file's bytes.
        num_channels: 1 for luminance, 3 for red, green, blue.
        max_pixels: Width times height above which the image is refused.

    Returns:
        Pixels [H, W, C], contiguous and writable.

    Raises:
        UnreadableImage: The bytes are no image, are cut off, or hold too many pixels.
    """
    image = open_image(content, num_channels=num_channels, max_pixels=max_pixels)
    pixels = np.array(image, dtype=np.uint8)
    pixels = pixels[:, :, None] if pixels.ndim == 2 else pixels
    return np.ascontiguousarray(np.broadcast_to(pixels, (*pixels.shape[:2], num_channels)))


def open_image(content: bytes, *, num_channels: int, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decoded image in mode `L` or `RGB`, rotated as its EXIF orientation asks.

    Palettes and CMYK become colours; transparency is laid over white; 16-bit gray is scaled to
    8 bits; wider integers and floats are stretched from their smallest to their largest value.

    Args:
        content: The file's bytes.
        num_channels: 1 gives `L`. 3 gives `RGB`, or `L` where the image holds no colour, which
            means three equal channels and saves resizing them three times.
        max_pixels: Width times height above which the image is refused.

    Raises:
        UnreadableImage: The bytes are no image, are cut off, or hold too many pixels.
    """
    if num_channels not in (1, 3):
        raise ValueError(
            f"num_channels {num_channels} cannot be decoded; choose 1 (gray) or 3 (colour)"
        )
    image = _load(content, max_pixels)
    try:
        ImageOps.exif_transpose(image, in_place=True)
        shown = _eight_bit(image)
        return shown.convert("L") if num_channels == 1 else shown
    except UnreadableImage:
        raise
    except _DAMAGE as error:
        raise _damaged(error) from error


def image_format(content: bytes) -> str:
    """Name of the encoding in lower case, as Pillow knows it (`jpeg`, `png`, `webp`, `tiff`)."""
    return (identify(content).format or "unknown").lower()


def _load(content: bytes, max_pixels: int) -> Image.Image:
    image = identify(content)
    width, height = image.size
    if width * height > max_pixels:
        raise _unreadable(
            "too_many_pixels", f"{width} x {height} is more than max_pixels {max_pixels}"
        )
    try:
        image.load()
    except _DAMAGE as error:
        raise _damaged(error) from error
    return image


def identify(content: bytes) -> Image.Image:
    """The image with size and format but without pixels: only its header is read.

    Raises:
        UnreadableImage: The bytes are no image.
    """
    if not content:
        raise _unreadable("empty", "the file holds no bytes")
    try:
        return Image.open(io.BytesIO(content), formats=_FORMATS)
    except UnidentifiedImageError as error:
        raise _unreadable("not_an_image", "no known image format starts like this") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _unreadable("too_many_pixels", str(error)) from error
    except _DAMAGE as error:
        raise _damaged(error) from error


def _unreadable(reason: DecodingFailure, detail: str) -> UnreadableImage:
    return UnreadableImage(f"{reason}: {detail}", reason=reason)


def _damaged(error: Exception) -> UnreadableImage:
    text = str(error).lower()
    is_cut_off = isinstance(error, (EOFError, struct.error)) or any(
        sign in text for sign in ("truncated", "unexpected end", "not enough", "eof")
    )
    return _unreadable("truncated" if is_cut_off else "unreadable", str(error))


def _eight_bit(image: Image.Image) -> Image.Image:
    """The image in mode `L` or `RGB`."""
    match image.mode:
        case "L" | "RGB":
            return image if "transparency" not in image.info else _over_white(image)
        case "1":
            return image.convert("L")
        case "I" | "F" | "I;16" | "I;16L" | "I;16B" | "I;16N":
            return _from_wide(image)
        case "P" | "LA" | "La" | "PA" | "RGBA" | "RGBa":
            return _over_white(image)
        case _:
            return image.convert("RGB")


def strips(image: Image.Image) -> Iterator[tuple[int, Image.Image]]:
    """Whole rows of an image, a million pixels at a time, and the number of the first of them.

    What needs many bytes per pixel is done strip by strip: an image may have 89 million.
    """
    height = max(1, _STRIP_PIXELS // max(1, image.width))
    for top in range(0, image.height, height):
        yield top, image.crop((0, top, image.width, min(top + height, image.height)))


def _over_white(image: Image.Image) -> Image.Image:
    if image.mode == "P" and "transparency" not in image.info:
        return image.convert("RGB")
    flat = Image.new("L" if image.mode in ("L", "LA", "La") else "RGB", image.size)
    for top, strip in strips(image):
        opaque = strip.convert("RGBA")
        white = Image.new("RGBA", opaque.size, (255, 255, 255, 255))
        flat.paste(Image.alpha_composite(white, opaque).convert("RGB").convert(flat.mode), (0, top))
    return flat


def _from_wide(image: Image.Image) -> Image.Image:
    low, high = 0.0, 0.0
    for _, strip in strips(image):
        values = np.asarray(strip)
        if not np.isfinite(values).all():
            raise _unreadable("unreadable", "the image holds values that are not finite")
        low, high = min(low, float(values.min())), max(high, float(values.max()))
    is_16_bit = image.mode != "F" and low >= 0 and high <= 65_535
    factor = 255 / (high - low) if high > low else 0.0
    gray = Image.new("L", image.size)
    for top, strip in strips(image):
        values = np.asarray(strip).astype(np.float64)
        values = values / 257 if is_16_bit else (values - low) * factor
        gray.paste(Image.fromarray(np.rint(values).astype(np.uint8)), (0, top))
    return gray
