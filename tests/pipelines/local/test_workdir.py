from __future__ import annotations

import fcntl
import json
from pathlib import Path

import pytest

from components.runtime.context import RunContext
from dinov2_core.errors import SettingsError
from pipelines.local.workdir import STATE, context_for, exclusive_workdir, write_state
from pipelines.spec.pipeline_spec import PipelineSpec, load_spec
from tests.pipelines.specs import small_values, write_spec


@pytest.fixture
def spec(tmp_path: Path) -> PipelineSpec:
    return load_spec(write_spec(small_values("s3://bucket/pile"), tmp_path / "spec.yaml"))


def begun(spec: PipelineSpec, workdir: Path, *, use_cache: bool = True) -> RunContext:
    context = context_for(spec, workdir=str(workdir), use_cache=use_cache)
    write_state(context, status="running")
    return context


def with_state(workdir: Path, **changes: str) -> None:
    state = json.loads((workdir / STATE).read_text())
    (workdir / STATE).write_text(json.dumps(state | changes))


def test_an_unwritable_workdir_is_explained() -> None:
    with (
        pytest.raises(SettingsError, match=r"cannot be written to .* choose another"),
        exclusive_workdir("/proc/dinopipe"),
    ):
        pass


def test_two_runs_do_not_share_a_workdir(tmp_path: Path) -> None:
    with (tmp_path / ".lock").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with (
            pytest.raises(SettingsError, match="another run is using"),
            exclusive_workdir(str(tmp_path)),
        ):
            pass


@pytest.mark.parametrize(
    ("status", "is_kept"),
    [("running", True), ("interrupted", True), ("failed", True), ("succeeded", False)],
)
def test_an_unfinished_run_keeps_its_identity_and_a_finished_one_does_not(
    status: str, is_kept: bool, spec: PipelineSpec, tmp_path: Path
) -> None:
    begun(spec, tmp_path)
    with_state(tmp_path, run_id="earlier", status=status)
    assert (begun(spec, tmp_path).run_id == "earlier") == is_kept


def test_another_spec_is_another_run(spec: PipelineSpec, tmp_path: Path) -> None:
    begun(spec, tmp_path)
    with_state(tmp_path, run_id="earlier")
    assert begun(spec.model_copy(update={"name": "other"}), tmp_path).run_id != "earlier"


@pytest.mark.parametrize("damage", ["", "{", '{"run_id": "x"}'])
def test_a_damaged_state_is_reported_and_written_again(
    damage: str, spec: PipelineSpec, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / STATE).write_text(damage)
    context = begun(spec, tmp_path)
    assert "state.json is damaged; this run gets an identity of its own" in caplog.text
    assert begun(spec, tmp_path).run_id == context.run_id


def test_a_profile_is_asked_for_without_another_identity(
    spec: PipelineSpec, tmp_path: Path
) -> None:
    plain = begun(spec, tmp_path)
    profiled = context_for(spec, workdir=str(tmp_path), use_cache=True, profile_steps=3)
    assert (plain.profile_steps, profiled.profile_steps) == (0, 3)
    assert plain.run_id == profiled.run_id


@pytest.mark.parametrize(
    ("in_spec", "asked"), [(True, True), (True, False), (False, True), (False, False)]
)
def test_the_spec_or_the_caller_turns_the_cache_off(
    in_spec: bool, asked: bool, spec: PipelineSpec, tmp_path: Path
) -> None:
    spec = spec.model_copy(update={"use_cache": in_spec})
    context = begun(spec, tmp_path, use_cache=asked)
    assert context.use_cache == (in_spec and asked)
    assert begun(spec, tmp_path, use_cache=asked).run_id == context.run_id
