"""scanning: nothing stops it, everything has a reason."""

from __future__ import annotations

import hashlib
import io

import numpy as np
from PIL import Image

from dinov2_core.curation.scanning import Refusal, hash_pixels, scan
from dinov2_core.curation.sources import MemoryImages


def encoded(image: Image.Image, file_format: str, **options: bool) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=file_format, **options)
    return buffer.getvalue()


GRAY = Image.fromarray(np.random.default_rng(0).integers(0, 256, (12, 20), dtype=np.uint8))
PNG = encoded(GRAY, "PNG")


class Broken(MemoryImages):
    """Storage that fails on the first image."""

    def read(self, number: int) -> bytes:
        if number == 0:
            raise OSError("no route to storage")
        return self.contents[number]


def test_every_file_gets_a_record_in_order() -> None:
    contents = (PNG, b"", b"text", PNG[:150], encoded(GRAY.resize((3, 30)), "PNG"), b"<html>")
    files = MemoryImages(names=tuple("abcdef"), contents=contents)
    found = list(scan(files, range(6), min_side_pixels=8, num_threads=3))
    assert [one.name for one in found] == list("abcdef")
    assert [one.refusal for one in found] == [
        None,
        Refusal.EMPTY,
        Refusal.NOT_AN_IMAGE,
        Refusal.TRUNCATED,
        Refusal.TOO_SMALL,
        Refusal.NOT_AN_IMAGE,
    ]
    assert [one.sha256 for one in found] == [hashlib.sha256(c).hexdigest() for c in contents]
    assert (found[0].width, found[0].height, found[0].format) == (20, 12, "png")
    assert (found[4].width, found[4].height, found[4].image) == (3, 30, None)


def test_some_files_are_looked_at_alone() -> None:
    files = MemoryImages(names=tuple("abc"), contents=(PNG, b"", PNG))
    found = list(scan(files, range(1, 3), min_side_pixels=8, num_threads=3))
    assert [one.name for one in found] == ["b", "c"]


def test_failing_storage_is_a_reason_too() -> None:
    files = Broken(names=("a", "b"), contents=(PNG, PNG))
    found = list(scan(files, range(2), min_side_pixels=1, num_threads=1))
    assert [one.refusal for one in found] == [Refusal.READ_FAILED, None]


def test_large_images_are_refused() -> None:
    files = MemoryImages(names=("a",), contents=(PNG,))
    (found,) = scan(files, range(1), min_side_pixels=1, num_threads=1, max_pixels=100)
    assert found.refusal is Refusal.TOO_MANY_PIXELS


def test_lossless_reencodings_have_equal_pixels() -> None:
    contents = (
        PNG,
        encoded(GRAY, "BMP"),
        encoded(GRAY, "GIF"),
        encoded(GRAY, "WEBP", lossless=True),
        encoded(GRAY.convert("RGB"), "PNG"),
    )
    files = MemoryImages(names=tuple("abcde"), contents=contents)
    found = list(scan(files, range(5), min_side_pixels=1, num_threads=1))
    assert len({one.pixel_sha256 for one in found}) == 1
    assert len({one.sha256 for one in found}) == 5


def test_shape_and_pixels_count() -> None:
    pixels = np.arange(24, dtype=np.uint8)
    hashes = {
        hash_pixels(Image.fromarray(array))
        for array in (
            pixels.reshape(4, 6),
            pixels.reshape(6, 4),
            pixels.reshape(2, 4, 3),
            pixels.reshape(4, 6) + 1,
        )
    }
    assert len(hashes) == 4
