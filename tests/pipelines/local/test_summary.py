from __future__ import annotations

import json
from pathlib import Path

import pytest

from components.runtime.context import RunContext
from components.runtime.manifests import Registration
from components.runtime.progress import Progress
from pipelines.local.run import LocalRun, Outcome
from pipelines.local.summary import result_of, summary_rows, write_result
from pipelines.spec.pipeline_spec import STAGES, PipelineSpec, load_spec
from tests.pipelines.specs import small_values, write_spec


def local_run(folder: Path, *progress: Progress, outcome: Outcome = "failed") -> LocalRun:
    context = RunContext(workdir=str(folder), run_id="r", run_name="r")
    context.progress_directory.mkdir(parents=True)
    for item in progress:
        path = context.progress_directory / f"{item.stage}.json"
        path.write_text(item.model_dump_json())
    return LocalRun(
        context=context, outcome=outcome, seconds=3.0, parent_run_id="p", log=folder / "log"
    )


def spec_in(folder: Path) -> PipelineSpec:
    return load_spec(write_spec(small_values(folder), folder / "spec.yaml"))


CURATED = Progress(
    stage="curate", state="succeeded", manifest_uri="/w/manifest.json", outputs="/w/curate",
    detail="4 of 5 kept; set aside: 1 truncated", seconds=61.0,
    numbers={"num_kept": 4.0, "audit/near_recall": 0.9},
)  # fmt: skip


def test_a_killed_stage_is_named_and_finished_ones_keep_their_numbers(tmp_path: Path) -> None:
    training = Progress(stage="pretrain", state="running", task="training")
    result = result_of(spec_in(tmp_path), local_run(tmp_path, CURATED, training))
    assert (result.status, result.failed_stage) == ("failed", "pretrain")
    assert "ended during training without an error of its own" in result.stages["pretrain"].error
    assert result.metrics == {"curate/num_kept": 4.0, "curate/audit/near_recall": 0.9}
    assert summary_rows(result) == [
        ("curate", "1 min 01 s", "4 of 5 kept; set aside: 1 truncated", "/w/curate"),
        ("pretrain", "0 s", "running", ""),
    ]
    written = json.loads(Path(write_result(result, str(tmp_path))).read_text())
    assert written["mlflow"]["model_version"] is None
    assert set(written["stages"]["curate"]) >= {"seconds", "cached", "state", "manifest", "error"}


@pytest.mark.parametrize(
    ("pretrain", "error"),
    [
        (
            Progress(stage="pretrain", state="failed", detail="stopped after step 3"),
            "stopped after",
        ),
        (Progress(stage="pretrain", state="running", task="starting"), "interrupted"),
    ],
)
def test_a_stage_that_was_interrupted_has_not_failed(
    pretrain: Progress, error: str, tmp_path: Path
) -> None:
    run = local_run(tmp_path, CURATED, pretrain, outcome="interrupted")
    result = result_of(spec_in(tmp_path), run)
    assert result.status == "interrupted"
    assert {name: stage.state for name, stage in result.stages.items()} == {
        "curate": "succeeded", "pretrain": "interrupted",
    }  # fmt: skip
    assert result.stages["pretrain"].error.startswith(error)


def test_the_registration_is_told_in_full(tmp_path: Path) -> None:
    registration = Registration(
        uri="models:/m/3", sha256="1", config_sha256="2", model_name="m", model_version=3,
        alias="champion", decision="it is better", tracking_uri="",
    )  # fmt: skip
    registration.write(tmp_path / "registration.json")
    stages = [
        Progress(stage=name, state="cached", manifest_uri=str(tmp_path / "registration.json"))
        for name in STAGES
    ]
    result = result_of(spec_in(tmp_path), local_run(tmp_path, *stages, outcome="succeeded"))
    assert result.status == "succeeded"
    assert (result.mlflow.model_version, result.mlflow.alias) == (3, "champion")
    assert result.mlflow.decision == "it is better"
    assert all(row[1] == "0 s (reused)" for row in summary_rows(result))


def test_names_of_an_evaluation_begin_with_its_set(tmp_path: Path) -> None:
    numbers = {"a/knn_top1": 0.8, "a/knn_top1_untrained": 0.5}
    evaluated = Progress(stage="evaluate", state="succeeded", manifest_uri="/m", numbers=numbers)
    assert result_of(spec_in(tmp_path), local_run(tmp_path, evaluated)).metrics == numbers


def test_outputs_below_this_directory_are_shown_from_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    here = CURATED.model_copy(update={"outputs": str(tmp_path / "work" / "curate")})
    ((*_, outputs),) = summary_rows(result_of(spec_in(tmp_path), local_run(tmp_path, here)))
    assert outputs == "work/curate"
