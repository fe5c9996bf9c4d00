from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INTERNAL_ERROR
from safetensors.numpy import load_file

from components.register.main import MODEL_CODE, main
from components.runtime.manifests import EvaluationReport, Registration
from components.runtime.registry import Registry, fetch_teacher, load_embedder
from components.runtime.tracking import Tracker
from dinov2_core.errors import TrackingRefused, TrackingUnavailable
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
    config = {"model_name": "registry-test", "gate": {"metric": METRIC, "minimum_gain": 0.01}}
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
    champions = load_embedder("models:/registry-test@champion", tracking_uri=uri)
    challengers = load_embedder("models:/registry-test@challenger", tracking_uri=uri)
    files = fetch_teacher(
        "models:/registry-test@champion", tracking_uri=uri, directory=tmp_path / "fetched"
    )
    assert load_file(files.weights)["norm.weight"].shape == (32,)
    assert json.loads(files.config.read_text())["architecture"]["embed_dim"] == 32
    embedded = champions(photographs[:3], 2)
    assert embedded.shape == (3, 32)
    assert not np.allclose(embedded, challengers(photographs[:3], 2))
    repeated = Registry(tracker.open(versions[1].mlflow_run_id), "registry-test").add(
        code=MODEL_CODE,
        weights=files.weights,
        config=files.config,
        example=photographs[0],
        documents={},
        metrics={},
    )
    assert repeated.version == versions[1].model_version  # its answer may have been lost
    assert len(tracker.client.search_model_versions("name = 'registry-test'")) == 3


def test_a_registry_that_fails_is_not_one_without_a_champion(tracker: Tracker) -> None:
    class Failing:
        def get_registered_model(self, _: str) -> None:
            raise MlflowException("time-out", error_code=INTERNAL_ERROR)

    run = dataclasses.replace(tracker.stage("register", key="fail"), client=Failing())  # type: ignore[arg-type]
    with pytest.raises(TrackingUnavailable, match="time-out"):
        Registry(run, "registry-test").under_alias("champion")


def test_a_model_that_does_not_exist_is_refused(tracker: Tracker) -> None:
    with pytest.raises(TrackingRefused, match="models:/nothing@champion is not in sqlite"):
        load_embedder(
            "models:/nothing@champion", tracking_uri=tracker.context.resolved_tracking_uri
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
