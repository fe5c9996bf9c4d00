"""curate: planted defects are found, the same files give the same tables."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from dinov2_core.curation.auditing import audit
from dinov2_core.curation.curate import (
    Curation,
    CurationSettings,
    EmbeddingOnly,
    Registration,
    curate,
)
from dinov2_core.curation.embedding import PixelEmbedder
from dinov2_core.curation.looking import looks
from dinov2_core.curation.manifest import MANIFEST_SCHEMA, write_table
from dinov2_core.curation.planting import PlantCounts, plant_defects
from dinov2_core.curation.sources import (
    FolderImages,
    ImageFiles,
    MemoryImages,
    Progress,
    no_progress,
)

Loader = Callable[[str, int], MemoryImages]
REGISTRATION = CurationSettings(verification=Registration())


def seen(files: ImageFiles, *, progress: Progress = no_progress) -> Iterator[pa.Table]:
    return looks(files, embedder=PixelEmbedder(), progress=progress)


@pytest.fixture(scope="module")
def planted(demo_images: Loader, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("planted")
    plant_defects(
        demo_images("train", 400),
        demo_images("test", 100),
        counts=PlantCounts(exact=20, near=60, leaks=20, corrupt=10, tiny=2),
        directory=folder / "pile",
        truth_path=folder / "truth.parquet",
        seed=0,
    )
    return folder


@pytest.fixture(scope="module")
def curation(demo_images: Loader, planted: Path) -> Curation:
    return curate(
        seen(FolderImages(planted / "pile")),
        evaluation=seen(demo_images("test", 100)),
        settings=REGISTRATION,
    )


def test_planted_defects_are_found_at_little_cost(curation: Curation, planted: Path) -> None:
    made = audit(curation.manifest, pq.read_table(planted / "truth.parquet"))
    assert made.exact.share == made.leaks.share == made.corrupt.share == made.tiny.share == 1
    assert made.near.share >= 0.9
    assert made.lost_share <= 0.01


def test_every_file_has_one_row_and_one_fate(curation: Curation, planted: Path) -> None:
    manifest = curation.manifest
    assert manifest.schema.equals(MANIFEST_SCHEMA)
    assert manifest["uri"].to_pylist() == sorted(p.name for p in (planted / "pile").iterdir())
    assert sum(count.num_images for count in curation.counts) == manifest.num_rows == 512
    assert pc.all(pc.equal(manifest["kept"], pc.equal(manifest["reason"], ""))).as_py()
    kept = manifest.filter(manifest["kept"])
    assert kept["uri"].to_pylist() == kept["representative"].to_pylist()
    assert len(set(kept["component"].to_pylist())) == kept.num_rows
    assert sum(size * number for size, number in curation.components.histogram) == 500


def test_the_same_files_give_the_same_bytes(
    curation: Curation, demo_images: Loader, planted: Path, tmp_path: Path
) -> None:
    told: set[str] = set()

    def progress(stage: str, _done: int, _total: int) -> None:
        told.add(stage)

    again = curate(
        seen(FolderImages(planted / "pile"), progress=progress),
        evaluation=seen(demo_images("test", 100), progress=progress),
        settings=REGISTRATION,
        progress=progress,
    )
    for name in ("manifest", "edges"):
        for run, made in (("a", curation), ("b", again)):
            write_table(getattr(made, name), tmp_path / run / name)
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert told == {"scan", "propose", "register"}


def test_edges_reach_below_the_thresholds(curation: Curation) -> None:
    similarity = curation.edges["similarity"].to_numpy()
    assert similarity.min() < REGISTRATION.verification.leak_threshold
    assert similarity.min() >= REGISTRATION.verification.leak_threshold - 0.0501


def test_embeddings_alone_decide_if_asked(
    demo_images: Loader, caplog: pytest.LogCaptureFixture
) -> None:
    train = demo_images("train", 60)
    chained = curate(
        seen(train),
        settings=CurationSettings(
            verification=EmbeddingOnly(near_threshold=0.3, leak_threshold=0.3)
        ),
    )
    assert chained.components.is_giant
    assert "chains distinct images" in caplog.text
    assert chained.counts[0].num_images < 30
    strict = CurationSettings(verification=EmbeddingOnly(near_threshold=0.999, leak_threshold=1.0))
    apart = curate(seen(train), settings=strict)
    assert apart.counts[0].num_images == 60


def test_seeds_call_up_their_like(demo_images: Loader) -> None:
    train = demo_images("train", 100)
    seeds = MemoryImages(names=train.names[:7], contents=train.contents[:7])
    made = curate(
        seen(train),
        seeds=seen(seeds),
        settings=CurationSettings(
            verification=EmbeddingOnly(near_threshold=0.9999, leak_threshold=1.0),
            seed_neighbours=3,
        ),
    )
    assert made.retrieval is not None
    assert made.retrieval.num_raw == 21
    kept = made.manifest.filter(made.manifest["kept"])["uri"].to_pylist()
    assert set(seeds.names) <= set(kept)
    assert len(kept) == made.retrieval.num_unique <= 21
    assert np.isin("not_retrieved", made.manifest["reason"].to_pylist())
