from __future__ import annotations

import io
import json
from pathlib import Path

import mlflow
import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
import torch
from PIL import Image
from sklearn.neighbors import KNeighborsClassifier

from components.evaluate.main import main
from components.runtime.manifests import EvaluationReport
from tests.components.teachers import dataset_of, random_checkpoint

REPOSITORY = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("sets")
    whole = parquet.read_table(REPOSITORY / "pipelines/demo/fashion_mnist_test.parquet")
    places = {}
    for name, start in (("train", 0), ("test", 1)):
        rows = whole.take(pa.array(range(start, 600, 2)))
        places[name] = str(folder / f"{name}.parquet")
        parquet.write_table(rows, places[name])
    return places


def evaluated(
    tables: dict[str, str] | None, workdir: Path, images: list[bytes]
) -> EvaluationReport:
    sets = [{"name": "clothes", **tables}] if tables else []
    config = {"sets": sets, "settings": {"neighbours": [1, 5]}}
    dataset_of(images, workdir / "data").write(workdir / "dataset.json")
    random_checkpoint(workdir / "teacher").write(workdir / "checkpoint.json")
    context = {"workdir": str(workdir), "run_id": "r", "run_name": "r"}
    flags = {
        "config": json.dumps(config),
        "context": json.dumps(context),
        "dataset": str(workdir / "dataset.json"),
        "checkpoint": str(workdir / "checkpoint.json"),
        "output": str(workdir / "report.json"),
    }
    assert main([part for name, value in flags.items() for part in (f"--{name}", value)]) == 0
    return EvaluationReport.read(workdir / "report.json")


def pixels_of(path: str) -> tuple[np.ndarray, list[str]]:
    table = parquet.read_table(path)
    images = [
        np.asarray(Image.open(io.BytesIO(content))).ravel()
        for content in table["image"].to_pylist()
    ]
    return np.stack(images).astype(np.float32) / 255, table["label"].to_pylist()


def test_numbers_stand_beside_two_baselines_on_the_same_split(
    tables: dict[str, str], tmp_path: Path, photographs: list[bytes]
) -> None:
    report = evaluated(tables, tmp_path, photographs)
    for kind in ("knn1_top1", "knn5_top1", "knn_top1", "logistic_top1"):
        for suffix in ("", "_untrained", "_pixels"):
            assert 0 <= report.metrics[f"clothes/{kind}{suffix}"] <= 1
    assert report.metrics["clothes/knn_top1"] == report.metrics["clothes/knn5_top1"]
    train, train_labels = pixels_of(tables["train"])
    test, test_labels = pixels_of(tables["test"])
    nearest = KNeighborsClassifier(1, metric="cosine").fit(train * 2 - 1, train_labels)
    expected = nearest.score(test * 2 - 1, test_labels)
    assert report.metrics["clothes/knn1_top1_pixels"] == pytest.approx(expected, abs=1e-9)
    assert 1 <= report.metrics["collapse/effective_rank"] <= 32


def test_pictures_lie_on_disk_and_in_mlflow(
    tables: dict[str, str], tmp_path: Path, photographs: list[bytes]
) -> None:
    report = evaluated(tables, tmp_path, photographs)
    names = {Path(path).name for path in report.pictures}
    assert names == {
        "clothes_accuracy.png", "clothes_neighbours.png", "clothes_patch_components.png",
        "clothes_scatter.png",
    }  # fmt: skip
    assert all(Path(path).read_bytes().startswith(b"\x89PNG") for path in report.pictures)
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    logged = client.list_artifacts(report.mlflow_run_id, "figures")
    assert {Path(item.path).name for item in logged} == names


def test_without_labels_collapse_is_measured_all_the_same(
    tmp_path: Path, photographs: list[bytes]
) -> None:
    report = evaluated(None, tmp_path, photographs)
    assert set(report.metrics) == {
        "collapse/effective_rank", "collapse/feature_deviation", "collapse/mean_cosine",
        "collapse/prototype_share", "collapse/effective_prototypes",
    }  # fmt: skip
    assert [Path(path).name for path in report.pictures] == ["patch_components.png"]


def test_moved_sets_are_the_same_evaluation(
    tables: dict[str, str], tmp_path: Path, photographs: list[bytes]
) -> None:
    moved = {}
    for name, place in tables.items():
        moved[name] = str(tmp_path / f"moved-{name}.parquet")
        Path(moved[name]).write_bytes(Path(place).read_bytes())
    torch.manual_seed(5)
    first = evaluated(tables, tmp_path / "one", photographs)
    second = evaluated(moved, tmp_path / "two", photographs)
    assert first.evaluation_sha256 == second.evaluation_sha256
    assert first.metrics == second.metrics
