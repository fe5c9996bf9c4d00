"""jpeg: damage that Pillow ignores is found, and what takes seconds is not decoded."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from dinov2_core.curation.jpeg import MAX_SCANNED_PIXELS, has_too_many_scans, is_damaged_jpeg
from dinov2_core.data.decoding import decode_image
from dinov2_core.errors import UnreadableImage

PIXELS = np.random.default_rng(0).integers(0, 256, (15, 20, 3), dtype=np.uint8)
PHOTO = Image.fromarray(PIXELS).resize((320, 240))


def encoded(image: Image.Image = PHOTO, file_format: str = "JPEG", **options: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
@pytest.mark.parametrize(
    "options", [{"quality": 30}, {"quality": 95, "progressive": 1}, {"subsampling": 0}]
)
def test_whole_images_are_not_damaged(mode: str, options: dict[str, int]) -> None:
    content = encoded(PHOTO.convert(mode), **options)
    assert not is_damaged_jpeg(content)
    assert not is_damaged_jpeg(content + b"trailing bytes of a camera" * 9)
    assert not has_too_many_scans(content, num_pixels=320 * 240)


def test_other_files_are_no_jpeg() -> None:
    for content in (b"", b"\xff", b"text", encoded(file_format="PNG")):
        assert not is_damaged_jpeg(content)
        assert not has_too_many_scans(content, num_pixels=10**12)


@pytest.mark.parametrize("progressive", [0, 1])
@pytest.mark.parametrize("replacement", [b"", bytes(100)], ids=["lost", "zeros"])
def test_data_that_are_lost_are_noticed(progressive: int, replacement: bytes) -> None:
    """Pillow decodes files without 100 bytes of their data to other pixels, and reports nothing."""
    whole = encoded(progressive=progressive)
    original = decode_image(whole, num_channels=3).astype(int)
    start = whole.find(b"\xff\xda") + 20
    visible, found = 0, 0
    for at in np.linspace(start, len(whole) - 120, 60).astype(int).tolist():
        content = whole[:at] + replacement + whole[at + 100 :]
        try:
            pixels = decode_image(content, num_channels=3)
        except UnreadableImage:
            continue
        if np.abs(pixels - original).mean() > 3:
            visible += 1
            found += is_damaged_jpeg(content)
    assert visible > 20
    assert found >= 0.9 * visible


def test_scans_are_counted_against_pixels() -> None:
    whole = encoded(Image.new("L", (64, 64)), progressive=1)
    scans = whole.count(b"\xff\xda")
    last = whole[whole.rfind(b"\xff\xda") : -2]
    many = whole[:-2] + 994 * last + whole[-2:]
    assert scans == 6
    assert decode_image(many, num_channels=1).shape == (64, 64, 1)
    most = MAX_SCANNED_PIXELS // 1000
    assert not has_too_many_scans(many, num_pixels=most)
    assert has_too_many_scans(many, num_pixels=most + 1)
