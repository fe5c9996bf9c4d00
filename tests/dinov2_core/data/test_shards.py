"""shards: bytes in, the same bytes out, deterministic files."""

from __future__ import annotations

import hashlib
import resource
import subprocess
import sys
import tarfile
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dinov2_core.data.shards import ShardReader, ShardWriter
from dinov2_core.errors import InputError

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
    with pytest.raises(InputError, match=r"holds no index\.parquet"):
        ShardReader(tmp_path)
    assert [path.name for path in tmp_path.glob("index*")] == []


def test_a_cut_shard_names_the_image(tmp_path: Path) -> None:
    shard = write(tmp_path) / "shard-00000.tar"
    shard.write_bytes(shard.read_bytes()[:1500])
    with ShardReader(tmp_path) as reader:
        sha256 = reader.entry(3).sha256
        with pytest.raises(InputError, match=f"ends within image {sha256}"):
            reader.read(3)


def test_copies_and_full_directories_are_refused(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "new", target_size_bytes=10) as writer:
        writer.add(b"x", extension="png", width=1, height=1)
        with pytest.raises(InputError, match="is already in"):
            writer.add(b"x", extension="png", width=1, height=1)
    with pytest.raises(InputError, match="already holds shards"):
        ShardWriter(tmp_path / "new", target_size_bytes=10)
    with pytest.raises(ValueError, match="target_size_bytes 0 is no size"):
        ShardWriter(tmp_path / "other", target_size_bytes=0)


def test_no_images_make_an_empty_set(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, target_size_bytes=10):
        pass
    assert len(ShardReader(tmp_path)) == 0


def test_digests_take_half_of_their_text_and_are_read_for_many_images_at_once(
    tmp_path: Path,
) -> None:
    write(tmp_path)
    stored = pq.read_table(tmp_path / "index.parquet")["sha256"]
    assert stored.type == pa.binary(32)
    with ShardReader(tmp_path) as reader:
        entries = reader.entries([19, 0, 7, 0])
        assert [entry.sha256 for entry in entries] == [
            hashlib.sha256(CONTENTS[number]).hexdigest() for number in (19, 0, 7, 0)
        ]
        assert entries[0] == reader.entry(19)


def test_an_index_of_earlier_versions_gives_the_same_images(tmp_path: Path) -> None:
    """Earlier versions wrote digests as text, all rows in one group."""
    write(tmp_path)
    with ShardReader(tmp_path) as reader:
        entries = reader.entries(range(20))
    names = ("sha256", "shard", "offset", "size_bytes", "width", "height")
    types = (pa.string(), pa.string(), pa.int64(), pa.int64(), pa.int32(), pa.int32())
    earlier = pa.table(
        {name: [getattr(entry, name) for entry in entries] for name in names},
        schema=pa.schema(list(zip(names, types, strict=True))),
    )
    pq.write_table(earlier, tmp_path / "index.parquet", compression="zstd")
    with ShardReader(tmp_path) as reader:
        assert [reader.read(number) for number in range(20)] == CONTENTS
        assert reader.entries(range(20)) == entries


def test_more_shards_than_files_may_be_open_are_read(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, target_size_bytes=1) as writer:  # a shard for every image
        for number in range(600):
            writer.add(b"%d" % number, extension="png", width=1, height=1)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with ShardReader(tmp_path) as reader:
        opened = sum(
            1 for _ in Path("/proc/self/fd").iterdir()
        )  # by whatever else runs in this process
        resource.setrlimit(resource.RLIMIT_NOFILE, (opened + 150, hard))
        try:
            for _ in range(2):
                assert [int(reader.read(number)) for number in range(600)] == list(range(600))
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def write_index(directory: Path, *, num_images: int) -> None:
    """An index as of images of 10 to 200 kB in shards of 256 MB, without the shards."""
    directory.mkdir()
    rows_per_group, per_shard = 1 << 16, 2500
    random = np.random.default_rng(0)
    writer = None
    for first in range(0, num_images, rows_per_group):
        numbers = np.arange(first, min(first + rows_per_group, num_images))
        digests = np.zeros((len(numbers), 32), dtype=np.uint8)
        digests[:, :8] = numbers.astype(">u8")[:, None].view(np.uint8)
        shards = numbers // per_shard
        known = np.arange(shards[0], shards[-1] + 1)
        indices = (shards - shards[0]).astype(np.int32)
        names = pa.array([f"shard-{shard:05d}.tar" for shard in known])
        table = pa.table(
            {
                "sha256": pa.FixedSizeBinaryArray.from_buffers(
                    pa.binary(32), len(numbers), [None, pa.py_buffer(digests.tobytes())]
                ),
                "shard": pa.DictionaryArray.from_arrays(indices, names).cast(pa.string()),
                "offset": numbers % per_shard * 200_192 + 512,
                "size_bytes": random.integers(10_000, 200_000, len(numbers)),
                "width": np.full(len(numbers), 500, dtype=np.int32),
                "height": np.full(len(numbers), 400, dtype=np.int32),
            }
        )
        writer = writer or pq.ParquetWriter(directory / "index.parquet", table.schema)
        writer.write_table(table)
    assert writer is not None
    writer.close()


def test_an_image_takes_eight_bytes_of_memory(tmp_path: Path) -> None:
    num_images = 10**6
    write_index(tmp_path / "large", num_images=num_images)
    ShardReader(write(tmp_path / "small"))  # what is loaded and cached only once
    arrow_before = pa.total_allocated_bytes()
    tracemalloc.start()
    reader = ShardReader(tmp_path / "large")
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(reader) == num_images
    assert 8 * num_images <= kept < 8.5 * num_images
    assert peak < 8 * num_images + 8e6
    assert pa.total_allocated_bytes() - arrow_before < 1e5
    entry = reader.entry(700_001)
    assert int(entry.sha256[:16], 16) == 700_001
    assert (entry.shard, entry.offset) == ("shard-00280.tar", 512 + 200_192)


@pytest.mark.slow
def test_a_hundred_million_images_open_within_a_gibibyte(tmp_path: Path) -> None:
    write_index(tmp_path / "large", num_images=10**8)
    program = """
import resource, sys
from pathlib import Path
from dinov2_core.data.shards import ShardReader
reader = ShardReader(Path(sys.argv[1]))
entry = reader.entry(87_654_321)
print(len(reader), int(entry.sha256[:16], 16), entry.shard)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
    ended = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "large")],
        capture_output=True,
        text=True,
        check=True,
    )
    facts, kibibytes = ended.stdout.splitlines()
    assert facts == "100000000 87654321 shard-35061.tar"
    assert int(kibibytes) < 2**20
