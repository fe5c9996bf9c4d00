"""sources: names and bytes belong together."""

from __future__ import annotations

from pathlib import Path

import pytest

from dinov2_core.curation.sources import FolderImages, MemoryImages


def test_folders_are_read_to_the_bottom_in_order(tmp_path: Path) -> None:
    (tmp_path / "b" / "c").mkdir(parents=True)
    for name in ("z.png", "a.txt", "b/c/x", "b/y.jpg"):
        (tmp_path / name).write_text(name)
    images = FolderImages(tmp_path)
    names = [images.name(number) for number in range(len(images))]
    assert names == ["a.txt", "b/c/x", "b/y.jpg", "z.png"]
    assert [images.read(number).decode() for number in range(4)] == names


def test_missing_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is no folder; point to"):
        FolderImages(tmp_path / "nothing")


def test_memory_needs_a_name_per_image() -> None:
    images = MemoryImages(names=("a", "b"), contents=(b"1", b"2"))
    assert (len(images), images.name(1), images.read(1)) == (2, "b", b"2")
    with pytest.raises(ValueError, match="1 names do not fit 2 contents"):
        MemoryImages(names=("a",), contents=(b"1", b"2"))
