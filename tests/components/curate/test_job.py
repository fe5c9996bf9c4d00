"""job: blocks are fixed by the files alone, and show how far the ranks came."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest

from components.curate.job import EmbeddingJob, ImageSet, read_blocks
from components.curate.stored_images import StoredImages
from components.runtime.storage import upload
from dinov2_core.curation.embedding import PixelEmbedder
from dinov2_core.curation.image_files import ImageFiles
from dinov2_core.curation.manifest import write_table
from dinov2_core.curation.scanning import BLOCK_FILES, scan_block
from dinov2_core.errors import InputError
from tests.dinov2_core.curation.image_files import numbered

JobOn = Callable[..., EmbeddingJob]


def scanned(files: ImageFiles, numbers: range) -> pa.Table:
    return scan_block(files, numbers, embedder=PixelEmbedder(), min_side_pixels=8, num_threads=1)


@pytest.fixture(params=["disk", "store"])
def job(request: pytest.FixtureRequest, s3: str, job_on: JobOn) -> EmbeddingJob:
    made = job_on(BLOCK_FILES + 1)
    source, _none = made.sets
    seeds = ImageSet(role="seeds", uris=(), num_files=1)
    changes: dict[str, object] = {"sets": (source, seeds)}
    if request.param == "store":
        changes["directory"] = "s3://pile/run/stage"
    return made.model_copy(update=changes)


def test_every_file_is_in_one_block(job: EmbeddingJob) -> None:
    assert [(block.name, len(block.numbers)) for block in job.blocks()] == [
        ("source/00000000.parquet", BLOCK_FILES),
        ("source/00000001.parquet", 1),
        ("seeds/00000000.parquet", 1),
    ]
    assert [block.name for block in job.blocks("seeds")] == ["seeds/00000000.parquet"]


def test_a_job_is_finished_when_all_blocks_are_saved(job: EmbeddingJob) -> None:
    assert job.progress_description() == "after 0 of 3 blocks of images"
    for block in job.blocks():
        assert not job.is_finished()
        files = numbered([b""] * BLOCK_FILES)
        write_table(scanned(files, range(len(block.numbers))), job.path_of(block))
        upload(job.path_of(block), job.uri_of(job.path_of(block)))
    assert job.is_finished()
    assert job.progress_description() == "after 3 of 3 blocks of images"


def test_a_job_survives_its_file(job: EmbeddingJob) -> None:
    job.write()
    assert EmbeddingJob.read(job.uri) == job


def test_blocks_of_other_files_are_refused(job_on: JobOn, tmp_path: Path) -> None:
    folder = tmp_path / "files"
    folder.mkdir()
    for name in "ab":
        (folder / name).write_bytes(b"")
    files = StoredImages([str(folder)])
    job = job_on(2)
    (block,) = job.blocks("source")
    write_table(scanned(files, block.numbers), job.path_of(block))
    (table,) = read_blocks(job, "source", files)
    assert table["name"].to_pylist() == ["a", "b"]
    (folder / "b").rename(folder / "c")
    with pytest.raises(InputError, match="files of the source images were added, removed or ren"):
        list(read_blocks(job, "source", StoredImages([str(folder)])))
