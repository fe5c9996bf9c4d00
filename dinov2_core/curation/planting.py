"""Planting: known defects put into a clean pile, so that curation can be audited."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image

from dinov2_core.curation.manifest import write_table
from dinov2_core.curation.sources import ImageFiles
from dinov2_core.data.decoding import image_format, open_image

_HTML = b"<!DOCTYPE html><html><body><h1>404 Not Found</h1></body></html>\n"
_TEXT = b"The file that you asked for has moved.\n"

TRUTH_SCHEMA = pa.schema(
    [
        pa.field("path", pa.string(), nullable=False),
        pa.field("kind", pa.string(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
    ]
)
"""`path` within the folder; `source` the path of the file it was made from, for leaks the name of
the evaluation image, for clean and corrupt files themselves."""


class Kind(StrEnum):
    """What a file of the audited pile is."""

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


@dataclass(frozen=True, slots=True, kw_only=True)
class PlantCounts:
    """How many defects of each kind; near, leaks and corrupt are spread evenly over their kinds."""

    exact: int
    near: int
    leaks: int
    corrupt: int
    tiny: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Planted:
    content: bytes
    extension: str
    kind: Kind
    source: int
    """Number in the clean pile, in the evaluation set for leaks."""


def plant_defects(
    clean: ImageFiles,
    evaluation: ImageFiles,
    *,
    counts: PlantCounts,
    directory: Path,
    truth_path: Path,
    seed: int,
) -> None:
    """Write the clean images and planted defects under neutral names, and the truth elsewhere.

    The same input and seed give the same files.

    Args:
        clean: Sound, distinct images.
        evaluation: Images that leak into the pile.
        counts: How many defects.
        directory: Where the pile goes; made if absent.
        truth_path: Parquet with `TRUTH_SCHEMA`, outside the directory.
        seed: Of sources, strengths and the order of the files.
    """
    rng = np.random.default_rng(seed)
    planted = [_copied(clean, number, Kind.CLEAN) for number in range(len(clean))]
    planted += _plant_copies(clean, counts, rng)
    planted += _plant_leaks(evaluation, counts, rng)
    planted += _plant_broken(clean, counts, rng)
    directory.mkdir(parents=True, exist_ok=True)
    places = rng.permutation(len(planted))
    paths = [f"{place:07d}.{p.extension}" for place, p in zip(places, planted, strict=True)]
    for path, item in zip(paths, planted, strict=True):
        (directory / path).write_bytes(item.content)
    sources = [
        evaluation.name(p.source) if p.kind in LEAK_KINDS else paths[p.source] for p in planted
    ]
    columns = {"path": paths, "kind": [p.kind.value for p in planted], "source": sources}
    write_table(pa.table(columns, schema=TRUTH_SCHEMA).sort_by("path"), truth_path)


def _plant_copies(
    clean: ImageFiles, counts: PlantCounts, rng: np.random.Generator
) -> Iterator[_Planted]:
    for number in _pick(len(clean), counts.exact, rng):
        yield _copied(clean, number, Kind.EXACT)
    makers: dict[Kind, Callable[[Image.Image, np.random.Generator], tuple[bytes, str]]] = {
        Kind.REENCODED: _reencoded,
        Kind.RESIZED: _resized,
        Kind.CROPPED: _cropped,
    }
    for turn, number in enumerate(_pick(len(clean), counts.near, rng)):
        kind = NEAR_KINDS[turn % len(NEAR_KINDS)]
        content, extension = makers[kind](_opened(clean, number), rng)
        yield _Planted(content=content, extension=extension, kind=kind, source=number)


def _plant_leaks(
    evaluation: ImageFiles, counts: PlantCounts, rng: np.random.Generator
) -> Iterator[_Planted]:
    for turn, number in enumerate(_pick(len(evaluation), counts.leaks, rng)):
        if turn % 2:
            content, extension = _reencoded(_opened(evaluation, number), rng)
            yield _Planted(
                content=content, extension=extension, kind=Kind.LEAK_REENCODED, source=number
            )
        else:
            yield _copied(evaluation, number, Kind.LEAK_EXACT)


def _plant_broken(
    clean: ImageFiles, counts: PlantCounts, rng: np.random.Generator
) -> Iterator[_Planted]:
    first = len(clean) + counts.exact + counts.near + counts.leaks
    for turn in range(counts.corrupt):
        kind = CORRUPT_KINDS[turn % len(CORRUPT_KINDS)]
        content, extension = _corrupt(kind, clean, rng)
        yield _Planted(content=content, extension=extension, kind=kind, source=first + turn)
    for turn in range(counts.tiny):
        shade = int(rng.integers(256))
        content = _encoded(Image.new("L", (1, 1), shade), "PNG")
        source = first + counts.corrupt + turn
        yield _Planted(content=content, extension="png", kind=Kind.TINY, source=source)


def _corrupt(kind: Kind, clean: ImageFiles, rng: np.random.Generator) -> tuple[bytes, str]:
    if kind is Kind.TRUNCATED:
        content = clean.read(int(rng.integers(len(clean))))
        return content[: int(len(content) * rng.uniform(0.3, 0.7))], image_format(content)
    if kind is Kind.GARBAGE:
        return rng.integers(0, 256, 500, dtype=np.uint8).tobytes(), "png"
    other = {Kind.EMPTY: b"", Kind.TEXT: _TEXT, Kind.HTML: _HTML}
    return other[kind], "jpg"


def _pick(total: int, wanted: int, rng: np.random.Generator) -> list[int]:
    if wanted > total:
        raise ValueError(f"{wanted} copies cannot be made of {total} images; plant at most {total}")
    chosen: list[int] = rng.permutation(total)[:wanted].tolist()
    return chosen


def _copied(files: ImageFiles, number: int, kind: Kind) -> _Planted:
    content = files.read(number)
    return _Planted(content=content, extension=image_format(content), kind=kind, source=number)


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
