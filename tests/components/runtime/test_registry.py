from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INTERNAL_ERROR
from safetensors.numpy import load_file

from components.register.bundle import write_model_code
from components.register.main import main
from components.runtime.manifests import EvaluationReport, Registration
from components.runtime.registry import (
    Registry,
    download_model,
    download_teacher,
    load_trusted,
    teacher_files,
)
from components.runtime.tracking import Tracker
from dinov2_core.errors import InputError, TrackingRefused, TrackingUnavailable
from tests.components.teachers import dataset_of, random_checkpoint

METRIC = "set/knn_top1"


def registered(
    shared: Path,
    folder: Path,
    photographs: list[bytes],
    *,
    seed: int,
    value: float,
    kubeflow_run: str = "",
    model_name: str = "registry-test",
) -> Registration:
    """Register a random teacher that was measured at `value`."""
    folder.mkdir()
    dataset_of(photographs[:4], folder / "data").write(folder / "dataset.json")
    random_checkpoint(folder / "teacher", seed=seed).write(folder / "checkpoint.json")
    EvaluationReport(
        uri="/r",
        sha256=f"{value}",
        config_sha256="0",
        metrics={METRIC: value, f"{METRIC}_untrained": 0.1},
        evaluation_sha256="e",
        pictures=(),
    ).write(folder / "report.json")
    config = {"model_name": model_name, "gate": {"metric": METRIC, "minimum_gain": 0.01}}
    run_id = "" if kubeflow_run else folder.name
    context = {"workdir": str(shared), "run_id": run_id, "run_name": "r"}
    flags = {
        "config": json.dumps(config),
        "context": json.dumps(context),
        "kubeflow-run": kubeflow_run,
        "output": str(folder / "registration.json"),
        **{name: str(folder / f"{name}.json") for name in ("dataset", "checkpoint", "report")},
    }
    assert main([part for name, given in flags.items() for part in (f"--{name}", given)]) == 0
    return Registration.read(folder / "registration.json")


def test_the_gate_moves_aliases_and_keeps_its_reasons(
    tracker: Tracker, shared_workdir: Path, tmp_path: Path, photographs: list[bytes]
) -> None:
    values = [0.5, 0.505, 0.6]
    versions = [
        registered(shared_workdir, tmp_path / f"r{i}", photographs, seed=i, value=value)
        for i, value in enumerate(values)
    ]
    assert [version.alias for version in versions] == ["champion", "challenger", "champion"]
    registry = Registry(tracker.stage("register", key="look"), "registry-test")
    champion = registry.under_alias("champion")
    challenger = registry.under_alias("challenger")
    assert champion is not None
    assert challenger is not None
    assert (champion.version, challenger.version) == (3, 2)
    assert "+0.1000 from the champion (version 1)" in champion.tags["dinopipe.decision"]
    assert "a gain of +0.0100 is needed" in challenger.tags["dinopipe.decision"]
    assert registry.under_alias("nobody") is None

    uri = tracker.context.resolved_tracking_uri
    files = download_teacher(
        "models:/registry-test@champion", tracking_uri=uri, directory=tmp_path / "champion"
    )
    assert files.weights.is_relative_to(tmp_path / "champion")
    assert load_file(files.weights)["norm.weight"].shape == (32,)
    assert files.weights.stat().st_mode & 0o400
    assert json.loads(files.config.read_text())["architecture"]["embed_dim"] == 32
    embedded = {
        alias: load_trusted(
            download_model(
                f"models:/registry-test@{alias}", tracking_uri=uri, directory=tmp_path / alias
            )
        )(photographs[:3])
        for alias in ("champion", "challenger")
    }
    assert embedded["champion"].shape == (3, 32)
    assert not np.allclose(embedded["champion"], embedded["challenger"])
    code = write_model_code(tmp_path / "code")
    repeated = Registry(tracker.open(versions[1].mlflow_run_id), "registry-test").add(
        code=code.model,
        package=code.package,
        weights=files.weights,
        config=files.config,
        example=photographs[0],
        documents={},
        metrics={},
    )
    assert repeated.version == versions[1].model_version  # its answer may have been lost
    assert len(tracker.client.search_model_versions("name = 'registry-test'")) == 3


def test_a_model_version_carries_its_code_and_nothing_else(
    tracker: Tracker, shared_workdir: Path, tmp_path: Path, photographs: list[bytes]
) -> None:
    registered(shared_workdir, tmp_path / "r", photographs, seed=0, value=0.5, model_name="files")
    root = download_model(
        "models:/files/1",
        tracking_uri=tracker.context.resolved_tracking_uri,
        directory=tmp_path / "downloaded",
    )
    names = {path.name for path in (root / "code").iterdir()}
    (package,) = names - {"teacher_model.py"}
    assert package.startswith("dinopipe_teacher_")
    suffixes = {path.suffix for path in (root / "code").rglob("*") if path.is_file()}
    assert suffixes == {".py"}
    assert {path.name for path in (root / "artifacts").iterdir()} == {
        "teacher.safetensors",
        "teacher.json",
        "evaluation.json",
    }


@pytest.mark.parametrize("named", ["../../secret", "/SECRET", "artifacts/link", "artifacts/absent"])
def test_a_model_names_no_file_outside_of_itself(tmp_path: Path, named: str) -> None:
    secret = tmp_path / "secret"
    secret.write_text("private")
    root = tmp_path / "downloads" / "model"
    (root / "artifacts").mkdir(parents=True)
    (root / "artifacts" / "config.json").write_text("{}")
    (root / "artifacts" / "link").symlink_to(secret)
    model = {
        "flavors": {
            "python_function": {
                "artifacts": {
                    "weights": {"path": named.replace("/SECRET", str(secret))},
                    "config": {"path": "artifacts/config.json"},
                }
            }
        }
    }
    (root / "MLmodel").write_text(json.dumps(model))
    with pytest.raises(InputError, match="as its weights, which is no file of the model"):
        teacher_files(root, model_uri="models:/m/1")
    assert secret.read_text() == "private"


def test_other_kinds_of_models_are_no_teachers(tmp_path: Path) -> None:
    assert teacher_files(tmp_path, model_uri="models:/m/1") is None
    for flavors in ({}, {"sklearn": {}}, {"python_function": {"artifacts": {"weights": 3}}}):
        (tmp_path / "MLmodel").write_text(json.dumps({"flavors": flavors}))
        assert teacher_files(tmp_path, model_uri="models:/m/1") is None


def test_a_registry_that_fails_is_not_one_without_a_champion(tracker: Tracker) -> None:
    class Failing:
        def get_registered_model(self, _: str) -> None:
            raise MlflowException("time-out", error_code=INTERNAL_ERROR)

    run = dataclasses.replace(tracker.stage("register", key="fail"), client=Failing())  # type: ignore[arg-type]
    with pytest.raises(TrackingUnavailable, match="time-out"):
        Registry(run, "registry-test").under_alias("champion")


def test_an_absent_model_is_refused(tracker: Tracker, tmp_path: Path) -> None:
    with pytest.raises(TrackingRefused, match="models:/nothing@champion is not in sqlite"):
        download_model(
            "models:/nothing@champion",
            tracking_uri=tracker.context.resolved_tracking_uri,
            directory=tmp_path,
        )


def test_registering_leaves_a_joined_run_open(
    tracker: Tracker,
    shared_workdir: Path,
    tmp_path: Path,
    photographs: list[bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Kubeflow's plugin closes the run that it opened; MLflow's own interface would do so too."""
    run = tracker.client.create_run(tracker.experiment_id, run_name="register")
    monkeypatch.setenv("MLFLOW_RUN_ID", run.info.run_id)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", tracker.experiment_id)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracker.context.resolved_tracking_uri)
    version = registered(
        shared_workdir, tmp_path / "joined", photographs, seed=9, value=0.9, kubeflow_run="kfp-1"
    )
    after = tracker.client.get_run(run.info.run_id)
    assert after.info.status == "RUNNING"
    assert after.data.tags["dinopipe.status"] == "FINISHED"
    model = tracker.client.get_model_version("registry-test", str(version.model_version))
    assert model.run_id == run.info.run_id
