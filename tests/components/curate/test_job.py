"""job: blocks are fixed by the files alone, and tell how far the ranks came."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from components.curate.job import EmbeddingJob, ImageSet, read_blocks
from components.curate.pile import StoredImages
from components.runtime.storage import upload
from dinov2_core.curation.embedding import PixelEmbedder
from dinov2_core.curation.looking import BLOCK_FILES, look
from dinov2_core.curation.manifest import write_table
from dinov2_core.curation.sources import MemoryImages

JobOn = Callable[..., EmbeddingJob]


@pytest.fixture(params=["disk", "store"])
def job(request: pytest.FixtureRequest, s3: str, job_on: JobOn) -> EmbeddingJob:
    made = job_on(BLOCK_FILES + 1)
    pile, _none = made.sets
    seeds = ImageSet(role="seeds", places=(), num_files=1)
    changes: dict[str, object] = {"sets": (pile, seeds)}
    if request.param == "store":
        changes["directory"] = "s3://pile/run/stage"
    return made.model_copy(update=changes)


def test_every_file_is_in_one_block(job: EmbeddingJob) -> None:
    assert [(block.name, len(block.numbers)) for block in job.blocks()] == [
        ("pile/00000000.parquet", BLOCK_FILES),
        ("pile/00000001.parquet", 1),
        ("seeds/00000000.parquet", 1),
    ]
    assert [block.name for block in job.blocks("seeds")] == ["seeds/00000000.parquet"]


def test_a_job_is_finished_when_all_blocks_are_there(job: EmbeddingJob) -> None:
    assert job.progress_description() == "after 0 of 3 blocks of images"
    for block in job.blocks():
        assert not job.is_finished()
        files = MemoryImages(names=["x"] * BLOCK_FILES, contents=[b""] * BLOCK_FILES)
        table = look(files, range(len(block.numbers)), embedder=PixelEmbedder())
        write_table(table, job.path_of(block))
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
    (block,) = job.blocks("pile")
    write_table(look(files, block.numbers, embedder=PixelEmbedder()), job.path_of(block))
    (seen,) = read_blocks(job, "pile", files)
    assert seen["name"].to_pylist() == ["a", "b"]
    (folder / "b").rename(folder / "c")
    with pytest.raises(ValueError, match=r"^pile: files were added, removed or renamed"):
        list(read_blocks(job, "pile", StoredImages([str(folder)])))
