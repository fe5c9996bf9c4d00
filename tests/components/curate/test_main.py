from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from components.curate.main import main
from components.runtime.manifests import DatasetManifest
from dinov2_core.data.shards import ShardReader


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, photographs: list[bytes]) -> Path:
    """A pile of 40 photographs and an evaluation set of 20 others."""
    folder = tmp_path_factory.mktemp("curate")
    (folder / "pile").mkdir()
    for number, content in enumerate(photographs[:40]):
        (folder / "pile" / f"{number:02d}.png").write_bytes(content)
    table = pa.table({"image": photographs[40:60], "label": ["x"] * 20})
    parquet.write_table(table, folder / "evaluation.parquet")
    return folder


def curated(folder: Path, workdir: Path, **planted: int) -> DatasetManifest:
    images: dict[str, object] = {"uri": str(folder / "pile")}
    if planted:
        images["planted"] = planted
    config = {"images": images, "evaluation_images": [str(folder / "evaluation.parquet")]}
    output = workdir / "dataset.json"
    context = {"workdir": str(workdir), "run_id": "r", "run_name": "r"}
    code = main(
        ["--config", json.dumps(config), "--context", json.dumps(context), "--output", str(output)]
    )
    assert code == 0
    return DatasetManifest.read(output)


def test_what_was_planted_is_found_and_counts_add_up(folder: Path, tmp_path: Path) -> None:
    dataset = curated(folder, tmp_path, exact_copies=6, near_copies=6, leaks=4, corrupt=10)
    assert dataset.num_images == 40 + 26
    assert dataset.counts_add_up()
    assert dataset.audit is not None
    assert dataset.audit.exact_recall == 1.0
    assert dataset.audit.leak_recall == 1.0
    assert dataset.audit.corrupt_recall == 1.0
    assert not Path(dataset.uri, "pile", "truth.parquet").exists()
    table = parquet.read_table(dataset.table_uri)
    assert table.num_rows == dataset.num_images
    assert sum(table["kept"].to_pylist()) == dataset.num_kept
    with ShardReader(Path(dataset.shards_uri)) as reader:
        kept = set(table.filter(table["kept"])["sha256"].to_pylist())
        assert {reader.entry(i).sha256 for i in range(len(reader))} == kept


def test_another_workdir_gives_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    made = [
        curated(folder, tmp_path / name, exact_copies=4, near_copies=4, leaks=2, corrupt=5)
        for name in ("one", "two")
    ]
    assert made[0].sha256 == made[1].sha256
    tables = [Path(dataset.table_uri).read_bytes() for dataset in made]
    assert tables[0] == tables[1]


def test_an_empty_pile_is_told(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "pile").mkdir()
    (tmp_path / "evaluation.parquet").write_bytes((folder / "evaluation.parquet").read_bytes())
    with pytest.raises(ValueError, match="holds no file; name a folder"):
        curated(tmp_path, tmp_path / "work")
