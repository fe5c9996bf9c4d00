from __future__ import annotations

from pathlib import Path

from components.runtime.context import RunContext


def test_without_a_server_runs_are_kept_in_the_work_directory() -> None:
    context = RunContext(workdir="/w", run_id="r", run_name="n")
    assert context.resolved_tracking_uri == "sqlite:////w/mlflow.db"
    named = context.model_copy(update={"tracking_uri": "http://host:5000"})
    assert named.resolved_tracking_uri == "http://host:5000"


def test_a_stage_has_a_directory_of_its_own() -> None:
    context = RunContext(workdir="/w", run_id="r", run_name="n")
    assert context.stage_directory("curate", "a" * 64) == Path("/w/stages/curate") / ("a" * 16)
    assert context.progress_directory == Path("/w/progress/r")
