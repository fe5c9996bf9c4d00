from __future__ import annotations

import json
import shutil
from pathlib import Path

import boto3
import mlflow
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from components.evaluate.config import EvaluationSet
from components.evaluate.main import labelled_pair, main
from components.runtime.manifests import EvaluationReport
from dinov2_core.errors import InputError
from tests.components.teachers import dataset_of, random_checkpoint

REPOSITORY = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Labelled images in two forms: train/CLASS and test.parquet."""
    folder = tmp_path_factory.mktemp("sets")
    whole = parquet.read_table(REPOSITORY / "pipelines/demo/fashion_mnist_test.parquet")
    rows = whole.slice(0, 80).to_pylist()
    parquet.write_table(whole.slice(80, 80), folder / "test.parquet")
    for number, row in enumerate(rows):
        path = folder / "train" / str(row["label"]) / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(row["image"])
    return folder


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, photographs: list[bytes]) -> Path:
    """A work directory with manifests of a data set and of a teacher."""
    home = tmp_path_factory.mktemp("home")
    dataset_of(photographs, home / "data").write(home / "dataset.json")
    random_checkpoint(home / "teacher").write(home / "checkpoint.json")
    return home


def evaluated(sets: str, home: Path) -> EvaluationReport:
    """Of train images in class folders and test images in a table, below a path or URI."""
    values = [{"name": "clothes", "train": f"{sets}/train", "test": f"{sets}/test.parquet"}]
    flags = {
        "config": json.dumps({"sets": values, "settings": {"neighbours": [1, 5]}}),
        "context": json.dumps({"workdir": str(home), "run_id": "r", "run_name": "r"}),
        "dataset": str(home / "dataset.json"),
        "checkpoint": str(home / "checkpoint.json"),
        "output": str(home / "report.json"),
    }
    assert main([part for name, value in flags.items() for part in (f"--{name}", value)]) == 0
    return EvaluationReport.read(home / "report.json")


@pytest.fixture(scope="module")
def report(sets: Path, home: Path) -> EvaluationReport:
    return evaluated(str(sets), home)


def test_pictures_lie_on_disk_and_in_mlflow(report: EvaluationReport, home: Path) -> None:
    names = {Path(path).name for path in report.pictures}
    assert names == {
        f"clothes_{figure}.png"
        for figure in ("accuracy", "neighbours", "patch_components", "scatter")
    }
    assert all(Path(path).read_bytes().startswith(b"\x89PNG") for path in report.pictures)
    client = mlflow.MlflowClient(f"sqlite:///{home}/mlflow.db")
    logged = client.list_artifacts(report.mlflow_run_id, "figures")
    assert {Path(item.path).name for item in logged} == names


def test_sets_in_a_store_are_measured_like_local_ones(
    s3: str, report: EvaluationReport, sets: Path, home: Path
) -> None:
    client = boto3.client("s3")
    for path in sorted(sets.rglob("*.p*")):
        client.upload_file(str(path), "pile", f"sets/{path.relative_to(sets).as_posix()}")
    remote = evaluated("s3://pile/sets", home)
    assert remote.mlflow_run_id != report.mlflow_run_id
    assert remote.metrics == report.metrics
    again = evaluated("s3://pile/sets", home)
    assert again == remote  # found by what the store says of the contents


def test_moved_sets_are_the_same_evaluation(
    report: EvaluationReport, sets: Path, home: Path, tmp_path: Path
) -> None:
    shutil.copytree(sets, tmp_path / "moved")
    assert evaluated(str(tmp_path / "moved"), home) == report


def test_classes_that_differ_name_the_set(sets: Path, tmp_path: Path) -> None:
    parquet.write_table(
        pa.table({"image": [b""] * 2, "label": ["bag", "umbrella"]}), tmp_path / "t"
    )
    differing = EvaluationSet(name="clothes", train=f"{sets}/train", test=str(tmp_path / "t"))
    with pytest.raises(InputError, match="evaluation_sets: clothes: .* only test has umbrella"):
        labelled_pair(differing)
