from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from components.curate.config import PixelEmbedding
from components.runtime.context import RunContext
from components.runtime.manifests import EvaluationReport
from components.runtime.progress import Progress
from components.runtime.stage import Stage, Workplace, entry_point, run_stage
from components.runtime.storage import StorageError
from components.runtime.tracking import Tracker


class Work:
    """A stage's work that counts how often it is done."""

    def __init__(self, *, error: Exception | None = None) -> None:
        self.error = error
        self.times = 0

    def __call__(self, place: Workplace) -> EvaluationReport:
        self.times += 1
        (place.directory / "partial").write_text("kept between attempts")
        if self.error is not None:
            raise self.error
        return EvaluationReport(
            uri=str(place.directory),
            sha256="1",
            config_sha256=place.config_sha256,
            mlflow_run_id=place.run.run_id,
            metrics={"m": 0.5},
            evaluation_sha256="2",
            pictures=(),
        )


def do(work: Work, context: RunContext, output: Path, *, identity: object = 1) -> int:
    stage = Stage(
        manifest_type=EvaluationReport,
        settings=PixelEmbedding(),
        identity=[identity, context.run_name],
        parents=(),
        work=work,
        metrics=lambda report: report.metrics,
    )
    executor_input = json.dumps(
        {
            "outputs": {
                "artifacts": {
                    "report": {"artifacts": [{"name": "report", "uri": str(output)}]},
                    "metrics": {"artifacts": [{"name": "metrics", "uri": "/m"}]},
                },
                "outputFile": str(output.with_suffix(".executor.json")),
            }
        }
    )
    args = argparse.Namespace(
        output=output,
        executor_input=executor_input,
        context=context.model_dump_json(),
        kubeflow_run="",
    )
    return run_stage("evaluate", args=args, prepare=lambda _: stage)


@pytest.fixture
def own(context: RunContext, request: pytest.FixtureRequest) -> RunContext:
    return context.model_copy(update={"run_name": request.node.name})


def state(context: RunContext) -> Progress:
    text = (context.progress_directory / "evaluate.json").read_text()
    return Progress.model_validate_json(text)


def test_equal_work_is_taken_over_and_says_so(own: RunContext, tmp_path: Path) -> None:
    work = Work()
    do(work, own, tmp_path / "a.json")
    assert state(own).state == "succeeded"
    later = own.model_copy(update={"run_id": own.run_id + "-later"})
    do(work, later, tmp_path / "b.json")
    assert work.times == 1
    assert state(later).state == "cached"
    assert (tmp_path / "a.json").read_text() == (tmp_path / "b.json").read_text()
    tracker = Tracker(later)
    children = tracker.client.search_runs(
        [tracker.experiment_id], f"tags.`mlflow.parentRunId` = '{tracker.parent()}'"
    )
    assert [child.data.metrics for child in children] == [{"m": 0.5}]


def test_a_work_directory_that_was_moved_is_not_believed(own: RunContext, tmp_path: Path) -> None:
    work = Work()
    do(work, own, tmp_path / "a.json")
    finished = next(own.root.glob("stages/evaluate/*/manifest.json"))
    for finished in own.root.glob("stages/evaluate/*/manifest.json"):
        text = finished.read_text().replace(str(own.root), "/another/place")
        finished.write_text(text)
    do(work, own, tmp_path / "b.json")
    assert work.times == 2


def test_other_inputs_are_other_work(own: RunContext, tmp_path: Path) -> None:
    work = Work()
    do(work, own, tmp_path / "a.json", identity=1)
    do(work, own, tmp_path / "b.json", identity=2)
    assert work.times == 2


def test_without_the_cache_a_new_run_begins_anew_but_a_restart_continues(
    own: RunContext, tmp_path: Path
) -> None:
    work = Work()
    do(work, own, tmp_path / "a.json")
    forced = own.model_copy(update={"use_cache": False, "run_id": own.run_id + "-forced"})
    broken = Work(error=RuntimeError("killed"))
    with pytest.raises(RuntimeError):
        do(broken, forced, tmp_path / "b.json")
    directory = next(own.root.glob("stages/evaluate/*/partial")).parent
    assert directory.exists()
    do(work, forced, tmp_path / "b.json")
    assert work.times == 2


def test_kubeflow_is_told_of_metadata_and_numbers(own: RunContext, tmp_path: Path) -> None:
    do(Work(), own, tmp_path / "a.json")
    told = json.loads((tmp_path / "a.executor.json").read_text())["artifacts"]
    assert told["metrics"]["artifacts"][0]["metadata"] == {"m": 0.5}
    assert told["report"]["artifacts"][0]["metadata"]["sha256"] == "1"


def test_a_failure_is_recorded_and_leaves_what_was_done(own: RunContext, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the pile is empty"):
        do(Work(error=ValueError("the pile is empty")), own, tmp_path / "a.json")
    assert state(own).detail == "the pile is empty"
    tracker = Tracker(own)
    runs = tracker.client.search_runs(
        [tracker.experiment_id], f"tags.`mlflow.parentRunId` = '{tracker.parent()}'"
    )
    assert runs[0].info.status == "FAILED"
    assert not (tmp_path / "a.json").exists()


@pytest.mark.parametrize(
    ("error", "code"),
    [(ValueError("x"), 2), (StorageError("x"), 2), (RuntimeError("x"), 1), (None, 0)],
)
def test_exit_codes_tell_input_from_faults(error: Exception | None, code: int) -> None:
    def prepare() -> int:
        if error is not None:
            raise error
        return 0

    assert entry_point("curate", prepare) == code
