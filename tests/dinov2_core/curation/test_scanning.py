"""scanning: nothing stops it, everything has a reason, and memory is bounded."""

from __future__ import annotations

import hashlib
import io
import struct
import threading
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray
from PIL import Image

from dinov2_core.curation import scanning
from dinov2_core.curation.embedding import PixelEmbedder
from dinov2_core.curation.image_files import ImageFiles
from dinov2_core.curation.manifest import write_table
from dinov2_core.curation.scanning import (
    BLOCK_FILES,
    SCAN_SCHEMA,
    blocks,
    hash_pixels,
    scan_block,
)
from dinov2_core.data.decoding import open_image
from dinov2_core.errors import ObjectUnreadable, StoreUnavailable
from tests.dinov2_core.curation.image_files import MemoryImages, numbered, scanned

Loader = Callable[[str, int], MemoryImages]


def encoded(image: Image.Image, file_format: str, **options: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=file_format, **options)
    return buffer.getvalue()


GRAY = Image.fromarray(np.random.default_rng(0).integers(0, 256, (12, 20), dtype=np.uint8))
PNG = encoded(GRAY, "PNG")


def scan(files: ImageFiles, *, min_side_pixels: int = 8, num_threads: int = 3) -> pa.Table:
    return scan_block(
        files,
        range(len(files)),
        embedder=PixelEmbedder(),
        min_side_pixels=min_side_pixels,
        num_threads=num_threads,
    )


class Counting(PixelEmbedder):
    """Counts the images it embeds, a few at a time."""

    batch_size = 2

    def __init__(self) -> None:
        self.batches: list[int] = []

    def embed(self, inputs: Sequence[NDArray[np.uint8]]) -> NDArray[np.float32]:
        self.batches.append(len(inputs))
        return super().embed(inputs)


def test_blocks_hold_every_file_once() -> None:
    assert blocks(0) == []
    for count in (1, BLOCK_FILES, BLOCK_FILES + 1, 5 * BLOCK_FILES - 1):
        assert [number for block in blocks(count) for number in block] == list(range(count))
        assert max(len(block) for block in blocks(count)) <= BLOCK_FILES


def test_every_file_gets_a_row_in_order() -> None:
    contents = (PNG, b"", b"text", PNG[:150], encoded(GRAY.resize((3, 30)), "PNG"), b"<html>")
    made = scan(MemoryImages(names=tuple("abcdef"), contents=contents))
    assert made["name"].to_pylist() == list("abcdef")
    assert made["reason"].to_pylist() == [
        "",
        "empty",
        "not_an_image",
        "truncated",
        "too_small",
        "not_an_image",
    ]
    assert made["sha256"].to_pylist() == [hashlib.sha256(c).hexdigest() for c in contents]
    assert made["size_bytes"].to_pylist() == [len(c) for c in contents]
    sizes = zip(made["width"].to_pylist(), made["height"].to_pylist(), strict=True)
    assert list(sizes) == [(20, 12), (0, 0), (0, 0), (0, 0), (3, 30), (0, 0)]
    assert made["format"].to_pylist() == ["png", "", "", "", "png", ""]


def test_a_block_has_all_of_its_files(demo_images: Loader, tmp_path: Path) -> None:
    png = demo_images("train", 4).contents
    contents = (b"", png[0], b"text", png[0], png[1], png[2], png[3])
    files = MemoryImages(names=tuple("abcdefg"), contents=contents)
    embedder = Counting()
    made = scan_block(files, range(1, 6), embedder=embedder, min_side_pixels=8, num_threads=2)
    assert made.schema.equals(SCAN_SCHEMA)
    assert made["name"].to_pylist() == ["b", "c", "d", "e", "f"]
    assert made["embedding"].is_valid().to_pylist() == [True, False, False, True, True]
    assert made["thumbnail"].is_valid().equals(made["embedding"].is_valid())
    assert embedder.batches == [2, 1], "an image is embedded once"
    inputs = [embedder.prepare(open_image(content, num_channels=3)) for content in png[:3]]
    vectors = made["embedding"].drop_null().combine_chunks().flatten().to_numpy()
    np.testing.assert_array_equal(vectors.reshape(3, -1), PixelEmbedder().embed(inputs))
    write_table(made, tmp_path / "block")
    assert pq.read_table(tmp_path / "block").equals(made)


def test_all_files_are_scanned_in_order() -> None:
    files = numbered([b""] * (BLOCK_FILES + 3))
    reported: list[tuple[str, int, int]] = []
    made = list(scanned(files, progress=lambda *report: reported.append(report)))
    assert [name for block in made for name in block["name"].to_pylist()] == files.names
    total = len(files)
    assert reported == [("scan", BLOCK_FILES, total), ("scan", total, total)]


@pytest.mark.parametrize("error", [OSError("no such file"), ObjectUnreadable("403")])
def test_a_file_that_cannot_be_read_has_a_reason(error: Exception) -> None:
    made = scan(Failing(names=("a", "b"), contents=(PNG, PNG), error=error))
    assert made["reason"].to_pylist() == ["read_failed", ""]
    assert made["sha256"].to_pylist()[0] == ""


def test_a_store_that_does_not_answer_is_no_reason() -> None:
    with pytest.raises(StoreUnavailable, match="503"):
        scan(Failing(names=("a", "b"), contents=(PNG, PNG), error=StoreUnavailable("503")))


class Failing:
    """Storage that fails on the first file."""

    def __init__(
        self, *, names: Sequence[str], contents: Sequence[bytes], error: Exception
    ) -> None:
        self._files = MemoryImages(names=names, contents=contents)
        self._error = error

    def __len__(self) -> int:
        return len(self._files)

    def name(self, number: int) -> str:
        return self._files.name(number)

    def size_bytes(self, number: int) -> int:
        return self._files.size_bytes(number)

    def read(self, number: int) -> bytes:
        if number == 0:
            raise self._error
        return self._files.read(number)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_large_images_are_not_decoded() -> None:
    header = struct.pack(">4sIIBBBBB", b"IHDR", 10_000, 9_000, 8, 0, 0, 0, 0)
    content = PNG[:12] + header + struct.pack(">I", zlib.crc32(header)) + PNG[33:]
    assert scan(numbered([content]))["reason"].to_pylist() == ["too_many_pixels"]


def test_jpegs_with_damaged_data_or_too_many_scans_have_a_reason() -> None:
    whole = encoded(GRAY.resize((300, 200)), "JPEG")
    lost = whole[: len(whole) // 2] + whole[len(whole) // 2 + 100 :]
    progressive = encoded(Image.new("L", (1000, 1000)), "JPEG", progressive=1)
    scans = progressive[progressive.rfind(b"\xff\xda") : -2] * 1100
    costly = progressive[:-2] + scans + progressive[-2:]
    made = scan(numbered([whole, lost, costly]))
    assert made["reason"].to_pylist() == ["", "damaged", "too_many_scans"]
    assert made["width"].to_pylist() == [300, 300, 0]


def test_lossless_reencodings_have_equal_pixels() -> None:
    contents = (
        PNG,
        encoded(GRAY, "BMP"),
        encoded(GRAY, "GIF"),
        encoded(GRAY, "WEBP", lossless=True),
        encoded(GRAY.convert("RGB"), "PNG"),
    )
    made = scan(numbered(contents))
    assert len(set(made["pixel_sha256"].to_pylist())) == 1
    assert len(set(made["sha256"].to_pylist())) == 5


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


@pytest.mark.parametrize("is_gray", [True, False])
def test_pixels_are_hashed_in_strips(is_gray: bool) -> None:
    """As all at once: sha256 of the shape and the pixels."""
    pixels = np.zeros((3000, 1000, 3), dtype=np.uint8)
    pixels[:, ::2] = 7
    if not is_gray:
        pixels[-1, -1, 2] = 9
    hashed = pixels[:, :, 0] if is_gray else pixels
    expected = hashlib.sha256(repr(hashed.shape).encode() + hashed.tobytes()).hexdigest()
    assert hash_pixels(Image.fromarray(pixels)) == expected


def test_memory_does_not_grow_with_the_number_of_images() -> None:
    """Decoded, the photographs of 12 megapixels are 640 MiB."""
    small = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    content = encoded(Image.fromarray(small).resize((4000, 3000)), "JPEG")
    before = memory_mib("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # starts the peak from now
    made = scan(numbered([content] * 14), num_threads=2)
    assert made["reason"].to_pylist() == [""] * 14
    assert memory_mib("VmHWM") - before < 300


def memory_mib(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) // 1024


@pytest.mark.parametrize(("share", "at_once"), [(1, 1), (2, 2), (3, 3)])
def test_threads_wait_until_their_images_fit(
    monkeypatch: pytest.MonkeyPatch, share: int, at_once: int
) -> None:
    class Watching(PixelEmbedder):
        def __init__(self) -> None:
            self.lock, self.busy, self.most = threading.Lock(), 0, 0

        def prepare(self, image: Image.Image) -> NDArray[np.uint8]:
            with self.lock:
                self.busy += 1
                self.most = max(self.most, self.busy)
            threading.Event().wait(0.03)
            with self.lock:
                self.busy -= 1
            return super().prepare(image)

    monkeypatch.setattr(scanning, "MAX_DECODED_BYTES", share * 20 * 12 * scanning.BYTES_PER_PIXEL)
    embedder = Watching()
    files = numbered([encoded(GRAY.rotate(turn), "PNG") for turn in range(12)])
    scan_block(files, range(12), embedder=embedder, min_side_pixels=8, num_threads=6)
    assert embedder.most == at_once
