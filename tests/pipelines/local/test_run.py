"""Whole runs on this machine, as small as they can be."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlflow
import pytest

from pipelines.local.run import WorkdirError, claimed_workdir, context_for
from pipelines.spec.pipeline_spec import load_spec
from tests.pipelines.specs import small_values, write_spec


def dinopipe(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pipelines", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **environment},
    )


def result(workdir: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((workdir / "run.json").read_text())
    return loaded


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


def test_all_five_stages_succeed_and_say_where_their_outputs_lie(first: FirstRun) -> None:
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
    assert any(line.startswith("[pretrain] training · step 12/12") for line in lines)
    noise = ("Warning", "INFO", "it/s", "Metrics(", "Traceback", "deprecated")
    assert not [line for line in lines if any(word in line for word in noise)]


def test_mlflow_shows_one_parent_with_a_nested_run_per_stage(first: FirstRun) -> None:
    place = first.result["mlflow"]
    client = mlflow.MlflowClient(
        tracking_uri=place["tracking_uri"], registry_uri=place["tracking_uri"]
    )
    parent = client.get_run(place["run_id"])
    assert parent.info.status == "FINISHED"
    assert parent.data.params["pretrain.learning.optimization.num_steps"] == "12"
    assert parent.data.tags["version.torch"].startswith("2.")
    children = client.search_runs(
        [parent.info.experiment_id], f"tags.`mlflow.parentRunId` = '{place['run_id']}'"
    )
    by_stage = {child.data.tags["dinopipe.stage"]: child for child in children}
    assert set(by_stage) == {"curate", "pretrain", "finetune", "evaluate", "register"}
    assert {child.info.status for child in children} == {"FINISHED"}
    losses = client.get_metric_history(by_stage["pretrain"].info.run_id, "loss/total")
    assert [point.step for point in losses] == list(range(12))
    assert by_stage["curate"].inputs.dataset_inputs[0].dataset.digest
    figures = client.list_artifacts(by_stage["evaluate"].info.run_id, "figures")
    assert any(figure.path.endswith(".png") for figure in figures)
    version = client.get_model_version_by_alias(place["model_name"], "champion")
    assert version.run_id == by_stage["register"].info.run_id
    assert version.tags["dinopipe.decision"] == "no gate is set"


def test_an_identical_run_takes_everything_over_and_says_so(first: FirstRun) -> None:
    again = dinopipe("run", first.spec, "--workdir", first.workdir)
    assert again.returncode == 0, again.stdout + again.stderr
    second = result(first.workdir)
    assert all(stage["cached"] for stage in second["stages"].values())
    assert "taken over" in again.stdout
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
    assert "cannot be read as an image" in broken[0]["error"]
    by_name = {Path(row["uri"]).name: row["embedding"] for row in rows}
    assert len(by_name["000.png"]) == 32
    assert by_name["000.png"] == pytest.approx(by_name["copy.png"], abs=1e-5)
    assert by_name["000.png"] != pytest.approx(by_name["001.png"], abs=1e-5)


def test_an_unknown_model_is_explained(first: FirstRun, pile: Path) -> None:
    uri = first.result["mlflow"]["tracking_uri"]
    done = dinopipe("embed", "--model", "models:/nobody@champion", pile, "--tracking-uri", uri)
    assert done.returncode == 2
    assert "models:/nobody@champion is not in" in done.stderr


def test_a_pile_of_only_corrupt_files_fails_with_the_stages_own_error_last(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "corrupt"
    folder.mkdir()
    for number in range(5):
        (folder / f"{number}.jpg").write_bytes(b"\xff\xd8\xff garbage")
    spec = write_spec(small_values(folder), tmp_path / "spec.yaml")
    ended = dinopipe("run", spec, "--workdir", tmp_path / "work")
    assert ended.returncode == 1
    last = ended.stderr.strip().splitlines()[-1]
    assert last.startswith("curate failed: none of the 5 files of images.uri")
    found = result(tmp_path / "work")
    assert found["status"] == "failed"
    assert list(found["stages"]) == ["curate"]
    assert found["stages"]["curate"]["error"] in last


def refused(values: dict[str, Any], folder: Path, *flags: str, code: int = 2) -> str:
    spec = write_spec(values, folder / "spec.yaml")
    ended = dinopipe("run", spec, "--workdir", folder / "work", *flags)
    assert ended.returncode == code, ended.stdout + ended.stderr
    assert not (folder / "work" / "stages").exists()
    return ended.stderr


def test_an_unreachable_tracking_server_is_reported_before_anything_starts(
    pile: Path, tmp_path: Path
) -> None:
    values = small_values(pile, tracking={"uri": "http://127.0.0.1:9"})
    text = refused(values, tmp_path, code=1)  # transient: the same command may succeed later
    assert "tracking server http://127.0.0.1:9 does not answer" in text
    assert "start the server" in text


def test_several_nodes_are_not_one_machine(pile: Path, tmp_path: Path) -> None:
    values = small_values(pile, pretrain__topology={"num_nodes": 2})
    assert "pretrain.topology.num_nodes: 2 is more than this one machine" in refused(
        values, tmp_path
    )


def test_without_a_docker_engine_its_runner_is_refused(pile: Path, tmp_path: Path) -> None:
    spec = write_spec(small_values(pile), tmp_path / "spec.yaml")
    ended = dinopipe(
        "run", spec, "--workdir", tmp_path / "work", "--runner", "docker",
        DOCKER_HOST="unix:///no/such/socket",
    )  # fmt: skip
    assert ended.returncode == 2
    assert "no Docker engine answers" in ended.stderr


def test_an_unwritable_workdir_is_told() -> None:
    with (
        pytest.raises(WorkdirError, match="cannot be written to .* choose another"),
        claimed_workdir("/proc/dinopipe"),
    ):
        pass


def test_two_runs_do_not_share_a_workdir(tmp_path: Path) -> None:
    with (tmp_path / ".lock").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with (
            pytest.raises(WorkdirError, match="another run is at work"),
            claimed_workdir(str(tmp_path)),
        ):
            pass


def test_an_unfinished_run_keeps_its_identity_and_a_finished_one_does_not(
    pile: Path, tmp_path: Path
) -> None:
    spec = load_spec(write_spec(small_values(pile), tmp_path / "spec.yaml"))
    first = context_for(spec, workdir=str(tmp_path), use_cache=True)
    assert context_for(spec, workdir=str(tmp_path), use_cache=True).run_id == first.run_id
    state = tmp_path / "state.json"
    state.write_text(state.read_text().replace("running", "succeeded"))
    os.environ["PATH"]  # the identity holds time and process, so ask from another process
    code = (
        "from pathlib import Path; from pipelines.spec.pipeline_spec import load_spec; "
        "from pipelines.local.run import context_for; import sys; "
        "print(context_for(load_spec(Path(sys.argv[1])), workdir=sys.argv[2], use_cache=True).run_id)"
    )
    other = _output(code, tmp_path / "spec.yaml", tmp_path)
    assert other != first.run_id


def test_a_profile_is_asked_for_without_another_identity(pile: Path, tmp_path: Path) -> None:
    spec = load_spec(write_spec(small_values(pile), tmp_path / "spec.yaml"))
    plain = context_for(spec, workdir=str(tmp_path), use_cache=True)
    profiled = context_for(spec, workdir=str(tmp_path), use_cache=True, profile_steps=3)
    assert (plain.profile_steps, profiled.profile_steps) == (0, 3)
    assert plain.run_id == profiled.run_id


def test_the_spec_or_the_caller_turns_the_cache_off(pile: Path, tmp_path: Path) -> None:
    for in_spec, asked in ((True, True), (True, False), (False, True)):
        values = small_values(pile, use_cache=in_spec)
        spec = load_spec(write_spec(values, tmp_path / "spec.yaml"))
        context = context_for(spec, workdir=str(tmp_path), use_cache=asked)
        assert context.use_cache == (in_spec and asked)
        again = context_for(spec, workdir=str(tmp_path), use_cache=asked)
        assert again.run_id == context.run_id


def _output(code: str, *arguments: Path) -> str:
    command: Sequence[str] = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
