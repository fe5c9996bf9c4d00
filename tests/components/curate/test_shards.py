"""shards: what is written is what was scanned."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pyarrow as pa
import pytest

from components.curate.shards import write_shards
from components.curate.stored_images import StoredImages
from dinov2_core.config.curation import AlignmentVerification
from dinov2_core.curation.curate import curate
from dinov2_core.curation.image_files import no_progress
from dinov2_core.curation.manifest import count_reasons
from dinov2_core.data.shards import ShardReader
from dinov2_core.errors import StoreUnavailable
from tests.dinov2_core.curation.image_files import numbered, scanned


@pytest.fixture
def folder(photographs: list[bytes], tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for number, content in enumerate(photographs[:6]):
        (folder / f"{number}.png").write_bytes(content)
    return folder


def manifest_of(source: StoredImages) -> pa.Table:
    return curate(scanned(source), verification=AlignmentVerification()).manifest


def test_files_that_changed_since_the_scan_are_dropped(folder: Path, tmp_path: Path) -> None:
    source = StoredImages([str(folder)])
    manifest = manifest_of(source)
    whole = (folder / "0.png").read_bytes()
    (folder / "0.png").write_bytes(whole[: len(whole) // 2])
    (folder / "1.png").unlink()
    (folder / "2.png").write_bytes((folder / "5.png").read_bytes())
    (folder / "3.png").write_bytes(b"")
    made = write_shards(
        source, manifest, tmp_path / "shards", size_bytes=10**6, progress=no_progress
    )
    assert count_reasons(made) == {"changed": 4}
    assert made.filter(made["kept"])["uri"].to_pylist() == ["4.png", "5.png"]
    assert made.drop_columns(["kept", "reason"]).equals(manifest.drop_columns(["kept", "reason"]))
    with ShardReader(tmp_path / "shards") as reader:
        digests = [reader.entry(number).sha256 for number in range(len(reader))]
    assert digests == [
        hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in ("4.png", "5.png")
    ]


def test_unchanged_files_leave_the_manifest_as_it_is(folder: Path, tmp_path: Path) -> None:
    source = StoredImages([str(folder)])
    manifest = manifest_of(source)
    made = [
        write_shards(source, manifest, tmp_path / "shards", size_bytes=1, progress=no_progress)
        for _ in range(2)
    ]
    assert made[0].equals(manifest)
    assert made[1].equals(manifest)
    assert len(list((tmp_path / "shards").glob("*.tar"))) == 6


def test_a_store_that_does_not_answer_is_no_change(
    folder: Path, photographs: list[bytes], tmp_path: Path
) -> None:
    class Unavailable:
        def __getattr__(self, name: str) -> object:
            return getattr(files, name)

        def __len__(self) -> int:
            return len(files)

        def read(self, number: int) -> bytes:
            raise StoreUnavailable("503")

    files = numbered(photographs[:2])
    manifest = curate(scanned(files), verification=AlignmentVerification()).manifest
    with pytest.raises(StoreUnavailable, match="503"):
        write_shards(
            Unavailable(),  # type: ignore[arg-type]
            manifest,
            tmp_path / "shards",
            size_bytes=1,
            progress=no_progress,
        )
