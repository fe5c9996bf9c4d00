"""Synthetic defects: known copies and broken files, added to images to audit curation."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image

from dinov2_core.config.curation import SyntheticDefects
from dinov2_core.curation.image_files import ImageFiles
from dinov2_core.curation.manifest import write_table
from dinov2_core.data.decoding import image_format, open_image
from dinov2_core.errors import SettingsError

TINY_SHARE = 5
"""Every fifth of the corrupt files is a 1 x 1 image."""

GROUND_TRUTH_SCHEMA = pa.schema(
    [
        pa.field("path", pa.string(), nullable=False),
        pa.field("kind", pa.string(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
    ]
)
"""`path` within the folder; `source` the path of the file it was made from, for leaks the name of
the evaluation image, for clean and corrupt files themselves."""


class Kind(StrEnum):
    """What a file of the audited folder is."""

    CLEAN = "clean"
    EXACT = "exact"
    """Byte for byte."""
    REENCODED = "reencoded"
    """JPEG or WebP of quality 60 to 95, lossless WebP, BMP, or GIF where that loses nothing."""
    RESIZED = "resized"
    """To 75 to 95 % or 125 to 200 % of each side."""
    CROPPED = "cropped"
    """To 85 to 96 % of each side, half of them resized back."""
    LEAK_EXACT = "leak_exact"
    LEAK_REENCODED = "leak_reencoded"
    TRUNCATED = "truncated"
    EMPTY = "empty"
    TEXT = "text"
    GARBAGE = "garbage"
    HTML = "html"
    TINY = "tiny"
    """An image of 1 x 1 pixel."""


NEAR_KINDS = (Kind.REENCODED, Kind.RESIZED, Kind.CROPPED)
LEAK_KINDS = (Kind.LEAK_EXACT, Kind.LEAK_REENCODED)
CORRUPT_KINDS = (Kind.TRUNCATED, Kind.EMPTY, Kind.TEXT, Kind.GARBAGE, Kind.HTML)

_FIXED_CONTENTS = {
    Kind.EMPTY: b"",
    Kind.TEXT: b"The file that you asked for has moved.\n",
    Kind.HTML: b"<!DOCTYPE html><html><body><h1>404 Not Found</h1></body></html>\n",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class _MadeFile:
    content: bytes
    extension: str
    kind: Kind
    source: int
    """Number among the clean images, for leaks among the evaluation images; -1 for itself."""


def add_defects(
    clean: ImageFiles,
    evaluation: ImageFiles,
    *,
    defects: SyntheticDefects,
    directory: Path,
    ground_truth_path: Path,
) -> None:
    """Write clean images and defects under neutral names, and the ground truth elsewhere.

    The same input gives the same files.

    Args:
        clean: Usable, distinct images.
        evaluation: Images of which leaks are made.
        defects: How many; near copies, leaks and corrupt files are spread evenly over their kinds.
        directory: For the files; made if absent.
        ground_truth_path: Parquet with `GROUND_TRUTH_SCHEMA`, outside the directory.

    Raises:
        SettingsError: There are fewer images than copies.
    """
    rng = np.random.default_rng(defects.seed)
    directory.mkdir(parents=True, exist_ok=True)
    made: list[tuple[Path, Kind, int]] = []
    for number, file in enumerate(_made_files(clean, evaluation, defects, rng)):
        path = directory / f".{number}.{file.extension}"
        path.write_bytes(file.content)
        made.append((path, file.kind, file.source))
    numbers = rng.permutation(len(made)).tolist()
    names = [f"{i:07d}{path.suffix}" for i, (path, _, _) in zip(numbers, made, strict=True)]
    for name, (path, _, _) in zip(names, made, strict=True):
        path.rename(directory / name)
    sources = [
        evaluation.name(source) if kind in LEAK_KINDS else name if source < 0 else names[source]
        for name, (_, kind, source) in zip(names, made, strict=True)
    ]
    columns = {"path": names, "kind": [kind.value for _, kind, _ in made], "source": sources}
    table = pa.table(columns, schema=GROUND_TRUTH_SCHEMA)
    write_table(table.sort_by("path"), ground_truth_path)


def _made_files(
    clean: ImageFiles, evaluation: ImageFiles, defects: SyntheticDefects, rng: np.random.Generator
) -> Iterator[_MadeFile]:
    for number in range(len(clean)):
        yield _copied(clean, number, Kind.CLEAN)
    for number in _pick(len(clean), "exact_copies", defects.exact_copies, rng):
        yield _copied(clean, number, Kind.EXACT)
    changes: dict[Kind, Callable[[Image.Image, np.random.Generator], tuple[bytes, str]]] = {
        Kind.REENCODED: _reencoded,
        Kind.RESIZED: _resized,
        Kind.CROPPED: _cropped,
    }
    for turn, number in enumerate(_pick(len(clean), "near_copies", defects.near_copies, rng)):
        kind = NEAR_KINDS[turn % len(NEAR_KINDS)]
        content, extension = changes[kind](_opened(clean, number), rng)
        yield _MadeFile(content=content, extension=extension, kind=kind, source=number)
    for turn, number in enumerate(_pick(len(evaluation), "leaks", defects.leaks, rng)):
        if turn % 2 == 0:
            yield _copied(evaluation, number, Kind.LEAK_EXACT)
            continue
        content, extension = _reencoded(_opened(evaluation, number), rng)
        kind = Kind.LEAK_REENCODED
        yield _MadeFile(content=content, extension=extension, kind=kind, source=number)
    num_tiny = defects.corrupt // TINY_SHARE
    for turn in range(defects.corrupt - num_tiny):
        kind = CORRUPT_KINDS[turn % len(CORRUPT_KINDS)]
        content, extension = _corrupt(kind, clean, rng)
        yield _MadeFile(content=content, extension=extension, kind=kind, source=-1)
    for _ in range(num_tiny):
        content = _encoded(Image.new("L", (1, 1), int(rng.integers(256))), "PNG")
        yield _MadeFile(content=content, extension="png", kind=Kind.TINY, source=-1)


def _corrupt(kind: Kind, clean: ImageFiles, rng: np.random.Generator) -> tuple[bytes, str]:
    if kind is Kind.TRUNCATED:
        content = clean.read(int(rng.integers(len(clean))))
        return content[: int(len(content) * rng.uniform(0.3, 0.7))], image_format(content)
    if kind is Kind.GARBAGE:
        return rng.integers(0, 256, 500, dtype=np.uint8).tobytes(), "png"
    return _FIXED_CONTENTS[kind], "jpg"


def _pick(total: int, key: str, wanted: int, rng: np.random.Generator) -> list[int]:
    if wanted > total:
        raise SettingsError(
            f"images.synthetic_defects.{key} {wanted} is more than the {total} images that there "
            f"are to copy; set it to at most {total}"
        )
    chosen: list[int] = rng.permutation(total)[:wanted].tolist()
    return chosen


def _copied(files: ImageFiles, number: int, kind: Kind) -> _MadeFile:
    content = files.read(number)
    return _MadeFile(content=content, extension=image_format(content), kind=kind, source=number)


def _opened(files: ImageFiles, number: int) -> Image.Image:
    return open_image(files.read(number), num_channels=3)


def _reencoded(image: Image.Image, rng: np.random.Generator) -> tuple[bytes, str]:
    quality = int(rng.integers(60, 96))
    is_gray = image.mode == "L"
    match int(rng.integers(5 if is_gray else 4)):
        case 0:
            return _encoded(image, "JPEG", quality=quality), "jpg"
        case 1:
            return _encoded(image, "WEBP", quality=quality), "webp"
        case 2:
            return _encoded(image, "WEBP", quality=100, lossless=True), "webp"
        case 3:
            return _encoded(image, "BMP"), "bmp"
        case _:
            return _encoded(image, "GIF"), "gif"


def _resized(image: Image.Image, rng: np.random.Generator) -> tuple[bytes, str]:
    factor = rng.uniform(0.75, 0.95) if rng.integers(2) else rng.uniform(1.25, 2)
    size = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
    return _encoded(image.resize(size, Image.Resampling.BICUBIC), "PNG"), "png"


def _cropped(image: Image.Image, rng: np.random.Generator) -> tuple[bytes, str]:
    width = max(1, round(image.width * rng.uniform(0.85, 0.96)))
    height = max(1, round(image.height * rng.uniform(0.85, 0.96)))
    left = int(rng.integers(image.width - width + 1))
    top = int(rng.integers(image.height - height + 1))
    crop = image.crop((left, top, left + width, top + height))
    if rng.integers(2):
        crop = crop.resize(image.size, Image.Resampling.BICUBIC)
    return _encoded(crop, "PNG"), "png"


def _encoded(image: Image.Image, file_format: str, **options: int | bool) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=file_format, **options)
    return buffer.getvalue()
