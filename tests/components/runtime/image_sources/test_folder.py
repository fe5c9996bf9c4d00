"""Files of folders and glob patterns."""

from __future__ import annotations

import glob
import os
from pathlib import Path

import pytest

from components.runtime.image_sources import source as source_module
from components.runtime.image_sources.folder import FolderSource, fixed_part
from dinov2_core.errors import InputError, ObjectUnreadable


def write(root: Path, *names: str) -> Path:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
    return root


def keys(pattern: Path | str) -> list[str]:
    return [item.key for item in FolderSource(str(pattern)).objects()]


def test_a_folder_is_read_in_order_without_hidden_files(tmp_path: Path) -> None:
    write(tmp_path, "b/2.png", "a/1.png", ".hidden/3.png", "a/.4.png")
    source = FolderSource(str(tmp_path))
    items = source.objects()
    assert [item.key for item in items] == ["a/1.png", "b/2.png"]
    assert [source.read(item) for item in items] == [b"a/1.png", b"b/2.png"]
    assert [item.size_bytes for item in items] == [7, 7]
    assert keys(tmp_path / "a/1.png") == ["1.png"]


def test_links_are_followed_once_and_a_broken_one_is_listed(tmp_path: Path) -> None:
    real = write(tmp_path / "elsewhere", "1.png")
    images = tmp_path / "images"
    images.mkdir()
    (images / "class").symlink_to(real)
    (images / "loop").symlink_to(images)
    (images / "gone.png").symlink_to(tmp_path / "nothing")
    (images / "self").symlink_to("self")
    source = FolderSource(str(images))
    items = {item.key: item for item in source.objects()}
    assert set(items) == {"class/1.png", "gone.png", "self"}
    assert source.read(items["class/1.png"]) == b"1.png"
    with pytest.raises(ObjectUnreadable, match="No such file"):
        source.read(items["gone.png"])


@pytest.mark.parametrize("pattern", ["**/*.png", "**", "*/**/*.png", "**/**/*.png"])
def test_a_pattern_finds_each_file_once_whatever_links_lead_to_it(
    tmp_path: Path, pattern: str
) -> None:
    write(tmp_path, "a/1.png", "a/b/2.png")
    for name in ("loop", "a/loop", "a/b/loop", "a/b/again"):
        (tmp_path / name).symlink_to(tmp_path)
    found = [Path(item.uri).resolve() for item in FolderSource(f"{tmp_path}/{pattern}").objects()]
    assert sorted(path.name for path in found) == ["1.png", "2.png"]


@pytest.mark.parametrize(
    "pattern",
    [
        "x/**/*.png", "x/*.png", "x/*/*.png", "**/2.png", "[xy]/?.*", "**/y/**", "x/**/y/*",
        "x/y*", "*", "**/.hidden/*", ".h*/*", "x/**", "none/*.png",
    ],
)  # fmt: skip
def test_patterns_match_what_the_standard_library_matches(tmp_path: Path, pattern: str) -> None:
    write(tmp_path, "x/1.png", "x/y/2.png", "x/3.txt", "x/y/z/4.png", "5.png", "y/6.png")
    write(tmp_path, ".hidden/7.png", "x/.8.png")
    expected = glob.glob(pattern, root_dir=tmp_path, recursive=True)
    expected = sorted({str(tmp_path / name) for name in expected if (tmp_path / name).is_file()})
    assert sorted(item.uri for item in FolderSource(f"{tmp_path}/{pattern}").objects()) == expected


def test_a_pattern_keeps_keys_relative_to_its_fixed_part(tmp_path: Path) -> None:
    write(tmp_path, "x/1.png", "x/y/2.png", "x/3.txt")
    assert keys(tmp_path / "x/**/*.png") == ["1.png", "y/2.png"]
    assert fixed_part(f"{tmp_path}/x/**/*.png") == f"{tmp_path}/x"
    assert fixed_part(str(tmp_path)) == str(tmp_path)


def test_a_folder_whose_name_looks_like_a_pattern_is_a_folder(tmp_path: Path) -> None:
    write(tmp_path / "photos [v1]", "1.png", "what?.png")
    assert keys(tmp_path / "photos [v1]") == ["1.png", "what?.png"]
    assert keys(tmp_path / "photos [v1]" / "what?.png") == ["what?.png"]


@pytest.mark.timeout(20)
def test_pipes_and_devices_are_listed_and_never_opened(tmp_path: Path) -> None:
    write(tmp_path, "1.png")
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    source = FolderSource(str(tmp_path))
    items = {item.key: item for item in source.objects()}
    assert set(items) == {"1.png", "pipe.png", "zero.png"}
    for name in ("pipe.png", "zero.png"):
        with pytest.raises(ObjectUnreadable, match=f"{name} is a pipe, a socket or a device"):
            source.read(items[name])


def test_a_name_that_is_not_utf8_is_escaped(tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    folder.mkdir()
    (folder / os.fsdecode(b"na\xefve.png")).write_bytes(b"1")
    source = FolderSource(str(tmp_path))
    (item,) = source.objects()
    assert item.key == r"caf\xe9/na\xefve.png"
    assert item.uri == rf"{tmp_path}/caf\xe9/na\xefve.png"
    assert source.read(item) == b"1"
    assert source.labels([item]) == [r"caf\xe9"]


def test_a_file_that_is_too_large_for_an_image_is_not_read(tmp_path: Path) -> None:
    path = write(tmp_path, "1.png") / "6-gigabytes.bin"
    with path.open("wb") as file:
        file.truncate(6 * 10**9)
    source = FolderSource(str(tmp_path))
    items = source.objects()
    assert items[1].size_bytes == 6 * 10**9
    with pytest.raises(ObjectUnreadable, match="has 6000000000 bytes, more than the 671088640"):
        source.read(items[1])
    assert source_module.content_digest(source, items[1]) == "unreadable"


def test_classes_are_the_first_folders(tmp_path: Path) -> None:
    write(tmp_path, "dog/2.png", "cat/x/b.png", "README")
    source = FolderSource(str(tmp_path))
    assert source.labels(source.objects()) == [None, "cat", "dog"]


def test_a_class_folder_without_an_image_of_its_own_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "cat/1.png")
    (tmp_path / "dog").symlink_to(tmp_path / "cat")
    source = FolderSource(str(tmp_path))
    with pytest.raises(InputError, match="class folder .*/dog has no image of its own"):
        source.labels(source.objects())
    (tmp_path / "dog").unlink()
    (tmp_path / "dog").symlink_to(write(tmp_path.parent / "elsewhere", "2.png"))
    assert source.labels(source.objects()) == ["cat", "dog"]


def test_a_missing_folder_says_where_to_change_it() -> None:
    with pytest.raises(InputError, match="does not exist; name an existing folder"):
        FolderSource("/no/such/folder")
