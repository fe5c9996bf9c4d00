from __future__ import annotations

from pathlib import Path

import pytest

from components.curate.stored_images import StoredImages
from dinov2_core.errors import InputError


def folder(path: Path, **files: bytes) -> str:
    path.mkdir()
    for name, content in files.items():
        (path / name).write_bytes(content)
    return str(path)


def test_several_sources_are_numbered_one_after_the_other(tmp_path: Path) -> None:
    uris = [
        folder(tmp_path / "a", x=b"1", y=b"2"),
        folder(tmp_path / "b"),
        folder(tmp_path / "c", x=b"3"),
    ]
    images = StoredImages(uris)
    assert [images.name(i) for i in range(len(images))] == ["0/x", "0/y", "2/x"]
    assert [images.read(i) for i in range(len(images))] == [b"1", b"2", b"3"]
    assert [images.size_bytes(i) for i in range(len(images))] == [1, 1, 1]


def test_one_source_needs_no_number(tmp_path: Path) -> None:
    images = StoredImages([folder(tmp_path / "a", x=b"1")])
    assert images.name(0) == "x"


def test_the_digest_is_of_content_and_not_of_the_uri(tmp_path: Path) -> None:
    def digest(name: str, **files: bytes) -> str:
        return StoredImages([folder(tmp_path / name, **files)]).digest(num_threads=2)

    same = [digest("a", x=b"1", y=b"2"), digest("b", x=b"1", y=b"2")]
    assert same[0] == same[1]
    assert digest("c", x=b"1", y=b"3") != same[0]
    assert digest("d", x=b"1", z=b"2") != same[0]


def test_no_source_has_no_image_and_a_missing_one_is_an_error(tmp_path: Path) -> None:
    assert len(StoredImages([])) == 0
    with pytest.raises(InputError):
        StoredImages([str(tmp_path / "none")])
