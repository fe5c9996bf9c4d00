"""Whole runs on this machine, as small as they can be."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlflow
import pytest
from rich.console import Console

from components.runtime.context import RunContext
from components.runtime.interrupts import StopRequests
from dinov2_core.errors import LeaseLost
from pipelines.__main__ import main
from pipelines.local.display import RunDisplay
from pipelines.local.kfp_execution import HostProcesses
from pipelines.local.run import _execute
from tests.pipelines.specs import small_values, write_spec


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "pipelines", *map(str, arguments)]


def dinopipe(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments),
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **environment},
    )


def result(workdir: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((workdir / "run.json").read_text())
    return loaded


def mlflow_statuses(workdir: Path) -> dict[str, str]:
    """Status of every MLflow run in a work directory, by its stage."""
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{workdir / 'mlflow.db'}")
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    return {
        run.data.tags["dinopipe.stage"]: run.info.status for run in client.search_runs(experiments)
    }


class FirstRun:
    """One finished run that several tests look at."""

    def __init__(self, folder: Path, pile: Path) -> None:
        self.spec = write_spec(small_values(pile), folder / "spec.yaml")
        self.workdir = folder / "work"
        self.ended = dinopipe("run", self.spec, "--workdir", self.workdir)
        assert self.ended.returncode == 0, self.ended.stdout + self.ended.stderr
        self.result = result(self.workdir)


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory, pile: Path) -> FirstRun:
    return FirstRun(tmp_path_factory.mktemp("first"), pile)


def test_all_five_stages_succeed_and_say_where_their_outputs_are(first: FirstRun) -> None:
    assert first.result["status"] == "succeeded"
    stages = first.result["stages"]
    assert list(stages) == ["curate", "pretrain", "finetune", "evaluate", "register"]
    assert all(Path(stage["manifest"]).is_file() for stage in stages.values())
    assert not any(stage["cached"] for stage in stages.values())
    assert first.result["metrics"]["curate/set_aside/exact_copy"] == 1
    assert first.result["metrics"]["curate/set_aside/not_an_image"] == 1
    assert first.result["metrics"]["pretrain/step"] == 12
    assert first.result["mlflow"]["alias"] == "champion"
    assert "96 of 98 kept" in first.ended.stdout


def test_plain_output_has_progress_and_no_noise(first: FirstRun) -> None:
    lines = (first.ended.stdout + first.ended.stderr).splitlines()
    assert lines[0] == f"log: {first.result['log']}"
    assert lines[2].endswith(first.result["mlflow"]["tracking_uri"])
    assert any(line.startswith("[curate] succeeded after ") for line in lines)
    assert any(line.startswith("[pretrain] training · step 12/12") for line in lines)
    noise = ("Warning", "INFO", "it/s", "Metrics(", "Traceback", "deprecated")
    assert not [line for line in lines if any(word in line for word in noise)]


def test_mlflow_shows_one_parent_with_a_nested_run_per_stage(first: FirstRun) -> None:
    record = first.result["mlflow"]
    client = mlflow.MlflowClient(
        tracking_uri=record["tracking_uri"], registry_uri=record["tracking_uri"]
    )
    parent = client.get_run(record["run_id"])
    assert parent.info.status == "FINISHED"
    assert parent.data.params["pretrain.learning.optimization.num_steps"] == "12"
    assert parent.data.tags["version.torch"].startswith("2.")
    children = client.search_runs(
        [parent.info.experiment_id], f"tags.`mlflow.parentRunId` = '{record['run_id']}'"
    )
    by_stage = {child.data.tags["dinopipe.stage"]: child for child in children}
    assert set(by_stage) == {"curate", "pretrain", "finetune", "evaluate", "register"}
    assert {child.info.status for child in children} == {"FINISHED"}
    losses = client.get_metric_history(by_stage["pretrain"].info.run_id, "loss/total")
    assert [point.step for point in losses] == list(range(12))
    assert by_stage["curate"].inputs.dataset_inputs[0].dataset.digest
    figures = client.list_artifacts(by_stage["evaluate"].info.run_id, "figures")
    assert any(figure.path.endswith(".png") for figure in figures)
    version = client.get_model_version_by_alias(record["model_name"], "champion")
    assert version.run_id == by_stage["register"].info.run_id
    assert version.tags["dinopipe.decision"] == "no gate is set"


def test_a_number_has_one_name_in_mlflow_and_in_the_result(first: FirstRun) -> None:
    record, metrics = first.result["mlflow"], first.result["metrics"]
    client = mlflow.MlflowClient(tracking_uri=record["tracking_uri"])
    experiment = client.get_run(record["run_id"]).info.experiment_id
    for stage in ("curate", "pretrain", "finetune", "evaluate", "register"):
        (run,) = client.search_runs([experiment], f"tags.`dinopipe.stage` = '{stage}'")
        prefix = "" if stage == "evaluate" else f"{stage}/"
        named = {name: value for name, value in metrics.items() if name.startswith(prefix)}
        if stage == "evaluate":
            named = {name: value for name, value in metrics.items() if name.startswith("collapse/")}
        assert named
        for name, value in named.items():
            assert run.data.metrics[name.removeprefix(prefix)] == pytest.approx(value)


def test_an_identical_run_reuses_everything_and_says_so(first: FirstRun) -> None:
    again = dinopipe("run", first.spec, "--workdir", first.workdir)
    assert again.returncode == 0, again.stdout + again.stderr
    second = result(first.workdir)
    assert all(stage["cached"] for stage in second["stages"].values())
    assert "reused" in again.stdout
    assert second["mlflow"]["model_version"] == first.result["mlflow"]["model_version"]
    assert second["mlflow"]["run_id"] != first.result["mlflow"]["run_id"]


def test_a_registered_teacher_embeds_images_in_one_line(
    first: FirstRun, pile: Path, tmp_path: Path
) -> None:
    import pyarrow.parquet as parquet

    output = tmp_path / "embeddings.parquet"
    done = dinopipe(
        "embed", "--model", "models:/small-teacher@champion", pile, "-o", output,
        MLFLOW_TRACKING_URI=first.result["mlflow"]["tracking_uri"],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = parquet.read_table(output).to_pylist()
    assert len(rows) == 98
    broken = [row for row in rows if row["embedding"] is None]
    assert [Path(row["uri"]).name for row in broken] == ["notes.txt"]
    assert broken[0]["error"].startswith("not_an_image")
    by_name = {Path(row["uri"]).name: row["embedding"] for row in rows}
    assert len(by_name["000.png"]) == 32
    assert by_name["000.png"] == pytest.approx(by_name["copy.png"], abs=1e-5)
    assert by_name["000.png"] != pytest.approx(by_name["001.png"], abs=1e-5)


def test_an_unknown_model_is_explained(
    first: FirstRun, pile: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    uri = first.result["mlflow"]["tracking_uri"]
    model = "models:/nobody@champion"
    assert main(["embed", "--model", model, str(pile), "--tracking-uri", uri]) == 2
    assert "models:/nobody@champion is not in" in capsys.readouterr().err


def interrupted(
    arguments: list[str | Path], when: Callable[[str], bool], *, by: signal.Signals
) -> tuple[int, str]:
    """Exit code and output of a program that gets a signal at a line; no other process does."""
    process = subprocess.Popen(
        command(*arguments), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None
    lines: list[str] = []
    for line in process.stdout:
        if when(line) and not any(map(when, lines)):
            process.send_signal(by)
        lines.append(line)
    return process.wait(), "".join(lines)


def test_sigterm_in_training_leaves_a_checkpoint_and_true_states(
    first: FirstRun, pile: Path, tmp_path: Path
) -> None:
    """As Slurm, systemd and `timeout` send it; in a work directory whose curation is done."""
    values = small_values(pile)
    values["pretrain"]["learning"]["optimization"]["num_steps"] = 5000
    spec = write_spec(values, tmp_path / "long.yaml")
    code, output = interrupted(
        ["run", spec, "--workdir", first.workdir],
        lambda line: line.startswith("[pretrain] training · step"),
        by=signal.SIGTERM,
    )
    assert code == 143, output
    assert output.endswith("interrupted; the same command continues where this run stopped\n")
    ended = result(first.workdir)
    assert ended["status"] == "interrupted"
    stopped = ended["stages"]["pretrain"]
    assert stopped["state"] == "interrupted"
    assert "with a checkpoint" in stopped["error"]
    state = json.loads((first.workdir / "state.json").read_text())
    assert (state["status"], state["run_id"]) == ("interrupted", ended["run_id"])
    checkpoints = first.workdir.glob("stages/pretrain/*/checkpoints/*/complete.json")
    steps = [int(path.parent.name.removeprefix("step_")) for path in checkpoints]
    assert any(f"after step {step}, with a checkpoint" in output for step in steps)
    client = mlflow.MlflowClient(tracking_uri=ended["mlflow"]["tracking_uri"])
    parent = client.get_run(ended["mlflow"]["run_id"])
    children = client.search_runs(
        [parent.info.experiment_id], f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'"
    )
    statuses = {child.data.tags["dinopipe.stage"]: child.info.status for child in children}
    assert parent.info.status == "KILLED"
    assert statuses == {"curate": "FINISHED", "pretrain": "KILLED"}


def test_sigterm_in_the_first_seconds_breaks_nothing(pile: Path, tmp_path: Path) -> None:
    """While MLflow's store is being made: half of one would be of no use to the next run."""
    spec, workdir = write_spec(small_values(pile), tmp_path / "spec.yaml"), tmp_path / "work"
    process = subprocess.Popen(
        command("run", spec, "--workdir", workdir),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    while not (workdir / "mlflow.db").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.terminate()
    output, _ = process.communicate()
    assert process.returncode == 143, output
    assert "the same command continues" in output
    assert "Traceback" not in output
    assert json.loads((workdir / "state.json").read_text())["status"] == "interrupted"
    assert result(workdir)["status"] == "interrupted"
    assert mlflow_statuses(workdir) == {"pipeline": "KILLED"}


@pytest.mark.parametrize(("by", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_before_anything_is_written_leaves_nothing(
    by: signal.Signals, code: int, pile: Path, tmp_path: Path
) -> None:
    spec, workdir = write_spec(small_values(pile), tmp_path / "spec.yaml"), tmp_path / "work"
    process = subprocess.Popen(
        command("run", spec, "--workdir", workdir), stderr=subprocess.PIPE, text=True
    )
    time.sleep(0.4)
    process.send_signal(by)
    _, errors = process.communicate()
    assert process.returncode in (code, -by)  # Python itself may still be starting
    assert "File " not in errors or process.returncode == -by
    assert not workdir.exists()


def test_a_pile_of_only_corrupt_files_fails_with_the_stages_own_error_last(tmp_path: Path) -> None:
    """Even where nobody reads what it prints."""
    folder = tmp_path / "corrupt"
    folder.mkdir()
    for number in range(5):
        (folder / f"{number}.jpg").write_bytes(b"\xff\xd8\xff garbage")
    spec, workdir = write_spec(small_values(folder), tmp_path / "spec.yaml"), tmp_path / "work"
    process = subprocess.Popen(
        command("run", spec, "--workdir", workdir),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.readline().startswith("log: ")
    process.stdout.close()  # as `head -1` does
    errors = process.stderr.read()
    assert process.wait() == 1
    last = errors.strip().splitlines()[-1]
    assert last.startswith("curate failed: none of the 5 files of images.uri")
    found = result(workdir)
    assert found["status"] == "failed"
    assert list(found["stages"]) == ["curate"]
    assert found["stages"]["curate"]["error"] in last
    assert mlflow_statuses(workdir) == {"pipeline": "FAILED", "curate": "FAILED"}


def test_a_run_that_lost_its_lease_kills_its_stage(tmp_path: Path) -> None:
    """Loading the package waits, as a stage would, until somebody writes it."""
    package = tmp_path / "package.yaml"
    os.mkfifo(package)
    stages = HostProcesses()
    stages._process = subprocess.Popen(["sleep", "100"])

    class Interrupted(RunDisplay):
        def refresh(self) -> None:
            raise LeaseLost("taken over by machine b")

    context = RunContext(workdir=str(tmp_path), run_id="r", run_name="r")
    with pytest.raises(LeaseLost):
        _execute(
            package,
            stages,
            context,
            log=tmp_path / "log",
            display=Interrupted(Console(quiet=True)),
            stop=StopRequests(),
        )
    assert stages._process.wait(timeout=10) == -signal.SIGKILL
    package.write_text("")
