from __future__ import annotations

import argparse
import errno
import json
import os
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from components.curate.config import PixelEmbedding
from components.runtime.context import RunContext
from components.runtime.manifests import EvaluationReport
from components.runtime.progress import Progress
from components.runtime.stage import Stage, StageContext, context_of, entry_point, run_stage
from components.runtime.storage import exists, list_names, read_text, write_text
from components.runtime.tracking import Tracker
from dinov2_core.errors import (
    ExitCode,
    InputError,
    LeaseLost,
    StageFailed,
    Stopped,
    StoreRefused,
    StoreUnavailable,
    TrackingUnavailable,
)
from tests.mlflow_server import mlflow_server
from tests.s3_server import BadLine


class Work:
    """A stage's work that counts how often it is done."""

    def __init__(self, *, error: Exception | None = None) -> None:
        self.error = error
        self.times = 0

    def __call__(self, stage: StageContext) -> EvaluationReport:
        self.times += 1
        (stage.directory / "partial").write_text("kept between attempts")
        if self.error is not None:
            raise self.error
        return EvaluationReport(
            uri=stage.uri(stage.directory),
            sha256="1",
            config_sha256=stage.config_sha256,
            mlflow_run_id=stage.run.run_id,
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


def test_equal_work_is_reused(own: RunContext, tmp_path: Path) -> None:
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


def test_the_manifest_of_a_work_directory_that_was_moved_is_not_used(
    own: RunContext, tmp_path: Path
) -> None:
    work = Work()
    do(work, own, tmp_path / "a.json")
    finished = next(own.root.glob("stages/evaluate/*/manifest.json"))
    for finished in own.root.glob("stages/evaluate/*/manifest.json"):
        text = finished.read_text().replace(str(own.root), "/another/place")
        finished.write_text(text)
    do(work, own, tmp_path / "b.json")
    assert work.times == 2


@pytest.mark.parametrize("damage", ["", '{"uri": '])
def test_a_damaged_manifest_is_reported_and_the_work_redone(
    damage: str, own: RunContext, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    work = Work()
    do(work, own, tmp_path / "a.json", identity=damage)
    finished = Path(state(own).manifest_uri)
    text = finished.read_text()
    finished.write_text(damage)
    do(work, own, tmp_path / "b.json", identity=damage)
    assert work.times == 2
    assert f"{finished} is damaged; redoing what it describes" in caplog.text
    assert finished.read_text() == text


def test_a_full_disk_is_named_with_what_is_free(own: RunContext, tmp_path: Path) -> None:
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.raises(InputError, match=rf"^{own.root}: No space left on device \(.* MiB free"):
        do(Work(error=full), own, tmp_path / "a.json")
    assert state(own).detail.startswith(f"{own.root}: No space left on device")


@pytest.fixture
def stored(own: RunContext, s3: str, shared_workdir: Path) -> RunContext:
    """A run whose work directory is in a store."""
    uri = f"sqlite:///{shared_workdir / 'mlflow.db'}"
    return own.model_copy(update={"workdir": "s3://pile/run", "tracking_uri": uri})


def test_a_store_gets_what_a_stage_makes_and_the_manifest_last(
    stored: RunContext, s3: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    work = Work()
    with BadLine(s3, faults=[], concerns=lambda *_: False).open(monkeypatch) as line:
        do(work, stored, tmp_path / "a.json")
    manifest = EvaluationReport.read(tmp_path / "a.json")
    assert manifest.uri.startswith("s3://pile/run/stages/evaluate/")
    kept = list_names(manifest.uri)
    assert kept == ["manifest.json", "partial", "run_id"]
    written = [path.rpartition("/")[2] for method, path in line.requests if method == "PUT"]
    assert written.index("partial") < written.index("manifest.json")
    assert read_text(f"{manifest.uri}/manifest.json") == (tmp_path / "a.json").read_text()
    progress = read_text(f"s3://pile/run/progress/{stored.run_id}/evaluate.json")
    assert Progress.model_validate_json(progress or "").manifest_uri.startswith("s3://pile/")
    shutil.rmtree(stored.root)
    do(work, stored, tmp_path / "b.json")
    assert work.times == 1
    assert (tmp_path / "b.json").read_text() == (tmp_path / "a.json").read_text()


def test_work_that_failed_leaves_no_manifest_in_the_store(
    stored: RunContext, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="the pile is empty"):
        do(Work(error=InputError("the pile is empty")), stored, tmp_path / "a.json")
    kept = list_names("s3://pile/run/stages")
    assert [name.rpartition("/")[2] for name in kept] == ["run_id"]
    progress = read_text(f"s3://pile/run/progress/{stored.run_id}/evaluate.json")
    assert Progress.model_validate_json(progress or "").state == "failed"


def test_without_the_cache_the_store_is_emptied_too(stored: RunContext, tmp_path: Path) -> None:
    work = Work()
    do(work, stored, tmp_path / "a.json")
    home = EvaluationReport.read(tmp_path / "a.json").uri
    write_text(f"{home}/checkpoints/step_1/old", "x")
    forced = stored.model_copy(update={"use_cache": False, "run_id": stored.run_id + "-forced"})
    do(work, forced, tmp_path / "b.json")
    assert work.times == 2
    assert not exists(f"{home}/checkpoints")


class Busy(Work):
    """Work during which another run wants to do the same."""

    def __init__(self, other: RunContext, output: Path) -> None:
        super().__init__()
        self.other, self.output, self.message = other, output, ""

    def __call__(self, stage: StageContext) -> EvaluationReport:
        try:
            do(Work(), self.other, self.output)
        except InputError as error:
            self.message = str(error)
        return super().__call__(stage)


def test_two_runs_do_not_do_the_same_work_at_a_time(own: RunContext, tmp_path: Path) -> None:
    other = own.model_copy(update={"run_id": own.run_id + "-other"})
    work = Busy(other, tmp_path / "b.json")
    do(work, own, tmp_path / "a.json")
    assert f"in use by process {os.getpid()} on " in work.message
    assert "wait for that run to end" in work.message
    do(Work(error=AssertionError("reused")), other, tmp_path / "b.json")


def test_runs_on_two_machines_do_not_do_the_same_work_at_a_time(
    stored: RunContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = stored.model_copy(update={"run_id": stored.run_id + "-other"})

    class Elsewhere(Busy):
        def __call__(self, stage: StageContext) -> EvaluationReport:
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("DINOPIPE_CACHE", str(tmp_path / "another cache"))
                try:
                    do(Work(), self.other, self.output)
                except InputError as error:
                    self.message = str(error)
            return Work()(stage)

    work = Elsewhere(other, tmp_path / "b.json")
    do(work, stored, tmp_path / "a.json")
    assert f"is in use by run {stored.run_id}; wait for that to end" in work.message
    do(Work(error=AssertionError("reused")), other, tmp_path / "b.json")


def test_a_stage_whose_lease_was_taken_writes_nothing_more(
    stored: RunContext, tmp_path: Path
) -> None:
    class TakenOver(Work):
        def __call__(self, stage: StageContext) -> EvaluationReport:
            lease = {"owner": "run other", "holder": "other", "until": time.time() + 100}
            write_text(stage.uri(stage.directory / "lease.json"), json.dumps(lease))
            return super().__call__(stage)

    with pytest.raises(LeaseLost, match="was taken over by run other; this run stops"):
        do(TakenOver(), stored, tmp_path / "a.json")
    kept = [name.rpartition("/")[2] for name in list_names("s3://pile/run/stages")]
    assert kept == ["lease.json", "run_id"]
    assert not (tmp_path / "a.json").exists()
    tracker = Tracker(stored)
    (run,) = tracker.client.search_runs(
        [tracker.experiment_id], f"tags.`mlflow.parentRunId` = '{tracker.parent()}'"
    )
    assert run.info.status == "KILLED"


class TestTrackingOutage:
    """An MLflow server that dies ends a stage with exit code 1, and loses no work."""

    @pytest.fixture
    def line(self, shared_workdir: Path, tmp_path: Path) -> Iterator[BadLine]:
        store = f"sqlite:///{shared_workdir / 'mlflow.db'}"
        Tracker(RunContext(workdir=str(shared_workdir), run_id="r", run_name="r"))
        with (
            pytest.MonkeyPatch.context() as patch,
            mlflow_server(patch, store=store, directory=tmp_path) as address,
        ):
            yield BadLine(address, faults=[], concerns=lambda *_: True)

    @pytest.mark.parametrize("moment", ["at the start", "in the middle", "at the end"])
    def test_it_ends_with_code_1_and_the_next_attempt_goes_on(
        self, moment: str, line: BadLine, own: RunContext, tmp_path: Path
    ) -> None:
        class Dying(Work):
            def __call__(self, stage: StageContext) -> EvaluationReport:
                result = super().__call__(stage)
                if self.times == 1 and moment != "at the start":
                    line.faults = ["drop"] * 10**4
                    if moment == "in the middle":
                        stage.run.log_metrics({"m": 0.5})
                return result

        work = Dying()
        with line.served() as address:
            served = own.model_copy(update={"tracking_uri": address})
            if moment == "at the start":
                line.faults = ["drop"] * 10**4
            args = (work, served, tmp_path / "a.json")
            assert entry_point("evaluate", lambda: do(*args)) == 1
            assert state(own).state == "failed"
            line.faults = []
            assert entry_point("evaluate", lambda: do(*args)) == 0
        assert work.times == (2 if moment == "in the middle" else 1)
        assert (tmp_path / "a.json").exists()


def test_other_inputs_are_other_work(own: RunContext, tmp_path: Path) -> None:
    work = Work()
    do(work, own, tmp_path / "a.json", identity=1)
    do(work, own, tmp_path / "b.json", identity=2)
    assert work.times == 2


def test_without_the_cache_a_new_run_starts_from_nothing_but_a_restart_continues(
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


def test_kubeflow_gets_metadata_and_numbers(own: RunContext, tmp_path: Path) -> None:
    do(Work(), own, tmp_path / "a.json")
    outputs = json.loads((tmp_path / "a.executor.json").read_text())["artifacts"]
    assert outputs["metrics"]["artifacts"][0]["metadata"] == {"m": 0.5}
    assert outputs["report"]["artifacts"][0]["metadata"]["sha256"] == "1"


def test_a_failure_is_recorded_and_leaves_what_was_done(own: RunContext, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="the pile is empty"):
        do(Work(error=InputError("the pile is empty")), own, tmp_path / "a.json")
    assert state(own).detail == "the pile is empty"
    tracker = Tracker(own)
    runs = tracker.client.search_runs(
        [tracker.experiment_id], f"tags.`mlflow.parentRunId` = '{tracker.parent()}'"
    )
    assert runs[0].info.status == "FAILED"
    assert not (tmp_path / "a.json").exists()


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (InputError("x"), 2),
        (StoreRefused("x"), 2),
        (StoreUnavailable("x"), 1),
        (TrackingUnavailable("x"), 1),
        (StageFailed("x"), 1),
        (LeaseLost("x"), 1),
        (Stopped("x"), 75),
        (KeyboardInterrupt(), 130),
        (RuntimeError("x"), 1),
        (ValueError("a shape"), 1),
        (None, 0),
    ],
)
def test_the_exit_code_and_the_traceback_follow_from_the_class(
    error: BaseException | None, code: int, capfd: pytest.CaptureFixture[str]
) -> None:
    def prepare() -> int:
        if error is not None:
            raise error
        return 0

    assert entry_point("curate", prepare) == code
    shown = capfd.readouterr().err
    is_fault_of_ours = type(error) in (RuntimeError, ValueError)
    assert ("Traceback" in shown) == is_fault_of_ours
    if error is not None and not is_fault_of_ours:
        assert shown == f"curate: {str(error) or 'interrupted'}\n"


def test_sigterm_ends_a_stage_as_an_interrupt_does() -> None:
    """A service manager sends it to all processes of a run."""

    def work() -> int:
        signal.raise_signal(signal.SIGTERM)
        return 0

    assert entry_point("curate", work) == ExitCode.TERMINATED


def test_on_a_cluster_the_injected_mlflow_run_is_joined(
    own: RunContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_RUN_ID", "of-the-plugin")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", "7")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow.example")
    compiled = own.model_copy(update={"run_id": ""})
    args = argparse.Namespace(context=compiled.model_dump_json(), kubeflow_run="kfp-1")
    context = context_of(args)
    assert (context.run_id, context.joined_run, context.joined_experiment) == (
        "kfp-1", "of-the-plugin", "7",
    )  # fmt: skip
    assert context.resolved_tracking_uri == "http://mlflow.example"


def test_on_this_machine_exported_variables_join_nothing(
    own: RunContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The user's shell may have them from another experiment."""
    monkeypatch.setenv("MLFLOW_RUN_ID", "0" * 32)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", "4711")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", own.resolved_tracking_uri)
    assert do(Work(), own, tmp_path / "report.json") == 0
    for run_id, kubeflow_run in ((own.run_id, "kfp-1"), ("", "")):
        given = own.model_copy(update={"run_id": run_id})
        args = argparse.Namespace(context=given.model_dump_json(), kubeflow_run=kubeflow_run)
        assert context_of(args).joined_run == ""
