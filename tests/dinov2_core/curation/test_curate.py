"""curate: synthetic defects are found, the same files give the same tables."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from dinov2_core.config.curation import (
    AlignmentVerification,
    EmbeddingVerification,
    SyntheticDefects,
)
from dinov2_core.curation.auditing import audit
from dinov2_core.curation.curate import Curation, curate
from dinov2_core.curation.manifest import MANIFEST_SCHEMA, count_reasons, write_table
from dinov2_core.curation.synthetic_defects import add_defects
from tests.dinov2_core.curation.image_files import MemoryImages, folder_images, numbered, scanned

Loader = Callable[[str, int], MemoryImages]
ALIGNMENT = AlignmentVerification()


@pytest.fixture(scope="module")
def folder(demo_images: Loader, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("defects")
    add_defects(
        demo_images("train", 400),
        demo_images("test", 100),
        defects=SyntheticDefects(exact_copies=20, near_copies=60, leaks=20, corrupt=12),
        directory=folder / "images",
        ground_truth_path=folder / "ground_truth.parquet",
    )
    return folder


@pytest.fixture(scope="module")
def curation(demo_images: Loader, folder: Path) -> Curation:
    return curate(
        scanned(folder_images(folder / "images")),
        evaluation=scanned(demo_images("test", 100)),
        verification=ALIGNMENT,
    )


def test_synthetic_defects_are_found_at_little_cost(curation: Curation, folder: Path) -> None:
    made = audit(curation.manifest, pq.read_table(folder / "ground_truth.parquet"))
    assert made.exact_recall == made.leak_recall == made.corrupt_recall == 1
    assert made.near_recall >= 0.9
    assert made.distinct_lost <= 0.01


def test_every_file_has_one_row_and_one_outcome(curation: Curation, folder: Path) -> None:
    manifest = curation.manifest
    assert manifest.schema.equals(MANIFEST_SCHEMA)
    assert manifest["uri"].to_pylist() == sorted(p.name for p in (folder / "images").iterdir())
    kept = manifest.filter(manifest["kept"])
    assert len(kept) + sum(count_reasons(manifest).values()) == manifest.num_rows == 512
    assert pc.all(pc.equal(manifest["kept"], pc.equal(manifest["reason"], ""))).as_py()
    assert kept["uri"].to_pylist() == kept["representative"].to_pylist()
    assert len(set(kept["component"].to_pylist())) == kept.num_rows
    usable = manifest.filter(pc.is_valid(manifest["component"]))
    assert usable.num_rows == 500
    members = pc.value_counts(usable["component"]).to_pylist()
    sizes = dict(
        zip(*usable.select(["component", "component_size"]).to_pydict().values(), strict=True)
    )
    assert {one["values"]: one["counts"] for one in members} == sizes


def test_the_same_files_give_the_same_bytes(
    curation: Curation, demo_images: Loader, folder: Path, tmp_path: Path
) -> None:
    reported: set[str] = set()

    def progress(work: str, _done: int, _total: int) -> None:
        reported.add(work)

    again = curate(
        scanned(folder_images(folder / "images"), progress=progress),
        evaluation=scanned(demo_images("test", 100), progress=progress),
        verification=ALIGNMENT,
        progress=progress,
    )
    for name in ("manifest", "edges"):
        for run, made in (("a", curation), ("b", again)):
            write_table(getattr(made, name), tmp_path / run / name)
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert reported == {"scan", "find candidates", "align"}


def test_edges_reach_below_the_thresholds(curation: Curation) -> None:
    similarity = curation.edges["similarity"].to_numpy()
    assert similarity.min() < ALIGNMENT.leak_threshold
    assert similarity.min() >= ALIGNMENT.leak_threshold - 0.0501


def test_embeddings_alone_decide_if_asked(
    demo_images: Loader, caplog: pytest.LogCaptureFixture
) -> None:
    train = demo_images("train", 60)
    loose = EmbeddingVerification(near_threshold=0.3, leak_threshold=0.3)
    joined = curate(scanned(train), verification=loose)
    assert "of 60 distinct images: near_threshold 0.3 may join images that are no" in caplog.text
    assert pc.sum(joined.manifest["kept"]).as_py() < 30
    strict = EmbeddingVerification(near_threshold=0.999, leak_threshold=1.0)
    apart = curate(scanned(train), verification=strict)
    assert pc.sum(apart.manifest["kept"]).as_py() == 60


def test_many_files_of_one_image_are_no_sign_of_a_low_threshold(
    demo_images: Loader, caplog: pytest.LogCaptureFixture
) -> None:
    (content,) = demo_images("train", 1).contents
    made = curate(scanned(numbered([content] * 12)), verification=ALIGNMENT)
    assert count_reasons(made.manifest) == {"exact_copy": 11}
    assert not caplog.text


def test_seeds_retrieve_their_like(demo_images: Loader) -> None:
    train = demo_images("train", 100)
    seeds = MemoryImages(names=train.names[:7], contents=train.contents[:7])
    made = curate(
        scanned(train),
        seeds=scanned(seeds),
        verification=EmbeddingVerification(near_threshold=0.9999, leak_threshold=1.0),
        seed_neighbours=3,
    )
    kept = made.manifest.filter(made.manifest["kept"])["uri"].to_pylist()
    assert set(seeds.names) <= set(kept)
    assert 7 < len(kept) <= 21
    assert count_reasons(made.manifest) == {"not_retrieved": 100 - len(kept)}
