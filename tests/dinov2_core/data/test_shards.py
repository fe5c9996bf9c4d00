"""shards: bytes in, the same bytes out, deterministic files."""

from __future__ import annotations

import hashlib
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from dinov2_core.data.shards import ShardReader, ShardWriter

CONTENTS = [bytes([number]) * (100 * number + 1) for number in range(20)]


def write(directory: Path) -> Path:
    with ShardWriter(directory, target_size_bytes=5000) as writer:
        for number, content in enumerate(CONTENTS):
            writer.add(content, extension="png", width=number, height=2 * number)
    return directory


def test_images_come_back_by_number(tmp_path: Path) -> None:
    with ShardReader(write(tmp_path)) as reader:
        assert len(reader) == len(CONTENTS)
        with ThreadPoolExecutor(8) as pool:
            assert list(pool.map(reader.read, range(20))) == CONTENTS
        entry = reader.entry(7)
    assert entry.sha256 == hashlib.sha256(CONTENTS[7]).hexdigest()
    assert (entry.width, entry.height, entry.size_bytes) == (7, 14, 701)


def test_shards_are_ordinary_tar_files(tmp_path: Path) -> None:
    write(tmp_path)
    shards = sorted(tmp_path.glob("shard-*.tar"))
    assert len(shards) > 2
    found = []
    for shard in shards:
        with tarfile.open(shard) as tar:
            for member in tar:
                extracted = tar.extractfile(member)
                assert extracted is not None
                content = extracted.read()
                assert member.name == f"{hashlib.sha256(content).hexdigest()}.png"
                assert member.mtime == 0
                found.append(content)
    assert found == CONTENTS


def test_the_same_images_give_the_same_files(tmp_path: Path) -> None:
    write(tmp_path / "a")
    write(tmp_path / "b")
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "b").iterdir())
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_an_unfinished_directory_is_refused(tmp_path: Path) -> None:
    with (
        pytest.raises(RuntimeError, match="stop"),
        ShardWriter(tmp_path, target_size_bytes=10) as writer,
    ):
        writer.add(b"x", extension="png", width=1, height=1)
        writer.add(b"y", extension="png", width=1, height=1)
        raise RuntimeError("stop")
    with pytest.raises(ValueError, match=r"holds no index\.parquet"):
        ShardReader(tmp_path)


def test_a_cut_shard_names_the_image(tmp_path: Path) -> None:
    shard = write(tmp_path) / "shard-00000.tar"
    shard.write_bytes(shard.read_bytes()[:1500])
    with ShardReader(tmp_path) as reader:
        sha256 = reader.entry(3).sha256
        with pytest.raises(ValueError, match=f"ends within image {sha256}"):
            reader.read(3)


def test_copies_and_full_directories_are_refused(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "new", target_size_bytes=10) as writer:
        writer.add(b"x", extension="png", width=1, height=1)
        with pytest.raises(ValueError, match="is already in"):
            writer.add(b"x", extension="png", width=1, height=1)
    with pytest.raises(ValueError, match="already holds shards"):
        ShardWriter(tmp_path / "new", target_size_bytes=10)
    with pytest.raises(ValueError, match="target_size_bytes 0 is no size"):
        ShardWriter(tmp_path / "other", target_size_bytes=0)


def test_no_images_make_an_empty_set(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, target_size_bytes=10):
        pass
    assert len(ShardReader(tmp_path)) == 0
