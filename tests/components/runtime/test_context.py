from __future__ import annotations

from pathlib import Path

import pytest

from components.runtime.context import RunContext
from components.runtime.tracking import Tracker


def test_without_a_server_runs_are_kept_in_the_work_directory() -> None:
    context = RunContext(workdir="/w", run_id="r", run_name="n")
    assert context.resolved_tracking_uri == "sqlite:////w/mlflow.db"
    named = context.model_copy(update={"tracking_uri": "http://host:5000"})
    assert named.resolved_tracking_uri == "http://host:5000"


def test_a_work_directory_of_any_name_keeps_its_store_and_artifacts(tmp_path: Path) -> None:
    root = tmp_path / "a?b=c %41 [v1] [" / "x] #1"
    root.mkdir(parents=True)
    before = set(tmp_path.rglob("*"))
    context = RunContext(workdir=str(root), run_id="r", run_name="n")
    Tracker(context).stage("evaluate", key="k").log_picture("figure.png", b"png")
    made = set(tmp_path.rglob("*")) - before
    assert all(path.is_relative_to(root) for path in made)
    names = {path.name for path in made}
    assert {"mlflow.db", "figure.png"} <= names


def test_a_stage_has_a_directory_of_its_own() -> None:
    context = RunContext(workdir="/w", run_id="r", run_name="n")
    assert context.stage_directory("curate", "a" * 64) == Path("/w/stages/curate") / ("a" * 16)
    assert context.progress_directory == Path("/w/progress/r")


def test_a_work_directory_in_a_store_has_a_mirror_image_here(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("DINOPIPE_CACHE", str(tmp_path))
    context = RunContext(workdir="s3://pile/run", run_id="r", run_name="n")
    assert context.root == tmp_path / "pile" / "run"
    assert context.uri_of(context.progress_directory) == "s3://pile/run/progress/r"
    assert context.resolved_tracking_uri == f"sqlite:///{tmp_path}/pile/run/mlflow.db"
    local = RunContext(workdir="/w", run_id="r", run_name="n")
    assert local.uri_of(local.progress_directory) == "/w/progress/r"
