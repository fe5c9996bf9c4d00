"""synthetic_defects: every file is what the ground truth says."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from dinov2_core.config.curation import SyntheticDefects
from dinov2_core.curation.synthetic_defects import Kind, add_defects
from dinov2_core.data.decoding import decode_image
from dinov2_core.errors import SettingsError, UnreadableImage
from tests.dinov2_core.curation.image_files import MemoryImages

DEFECTS = SyntheticDefects(exact_copies=4, near_copies=30, leaks=6, corrupt=12)
Loader = Callable[[str, int], MemoryImages]


def add(demo_images: Loader, folder: Path, seed: int = 0) -> Path:
    add_defects(
        demo_images("train", 40),
        demo_images("test", 10),
        defects=DEFECTS.model_copy(update={"seed": seed}),
        directory=folder / "images",
        ground_truth_path=folder / "ground_truth.parquet",
    )
    return folder


def test_every_kind_is_made(demo_images: Loader, tmp_path: Path) -> None:
    add(demo_images, tmp_path)
    rows = pq.read_table(tmp_path / "ground_truth.parquet").to_pylist()
    assert Counter(row["kind"] for row in rows) == {
        "clean": 40, "exact": 4, "reencoded": 10, "resized": 10, "cropped": 10,
        "leak_exact": 3, "leak_reencoded": 3,
        "truncated": 2, "empty": 2, "text": 2, "garbage": 2, "html": 2, "tiny": 2,
    }  # fmt: skip
    assert sorted(path.name for path in (tmp_path / "images").iterdir()) == [
        row["path"] for row in rows
    ]
    test_images = demo_images("test", 10)
    by_name = dict(zip(test_images.names, test_images.contents, strict=True))
    for row in rows:
        kind = Kind(row["kind"])
        content = (tmp_path / "images" / row["path"]).read_bytes()
        if kind in (Kind.TRUNCATED, Kind.EMPTY, Kind.TEXT, Kind.GARBAGE, Kind.HTML):
            with pytest.raises(UnreadableImage):
                decode_image(content, num_channels=1)
            continue
        shape = decode_image(content, num_channels=1).shape[:2]
        if kind is Kind.TINY:
            assert shape == (1, 1)
        elif kind is Kind.LEAK_EXACT:
            assert content == by_name[row["source"]]
        elif kind is Kind.EXACT:
            assert content == (tmp_path / "images" / row["source"]).read_bytes()
        elif kind is Kind.CROPPED:
            assert shape == (28, 28) or all(24 <= side <= 27 for side in shape)
        elif kind is Kind.RESIZED:
            assert shape[0] == shape[1] != 28
            assert 21 <= shape[0] <= 56
        elif kind is Kind.REENCODED:
            source = (tmp_path / "images" / row["source"]).read_bytes()
            assert content != source
            pixels, original = (decode_image(c, num_channels=1) for c in (content, source))
            assert np.abs(pixels.astype(int) - original).mean() < 15


def test_the_seed_decides_everything(demo_images: Loader, tmp_path: Path) -> None:
    files = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        folder = add(demo_images, tmp_path / name, seed)
        files.append({p.relative_to(folder): p.read_bytes() for p in folder.rglob("*.*")})
    assert files[0] == files[1]
    assert files[0] != files[2]


def test_more_copies_than_images_are_refused(demo_images: Loader, tmp_path: Path) -> None:
    with pytest.raises(
        SettingsError,
        match=r"synthetic_defects\.exact_copies 7 is more than the 5 images .* at most 5",
    ):
        add_defects(
            demo_images("train", 5),
            demo_images("test", 5),
            defects=SyntheticDefects(exact_copies=7),
            directory=tmp_path / "images",
            ground_truth_path=tmp_path / "ground_truth.parquet",
        )
