from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipelines.__main__ import main
from tests.pipelines.specs import small_values, write_spec


def refused(
    values: dict[str, Any],
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    *flags: str,
    code: int = 2,
) -> str:
    """The error of a run that ends before any work."""
    spec = write_spec(values, folder / "spec.yaml")
    assert main(["run", str(spec), "--workdir", str(folder / "work"), *flags]) == code
    assert not (folder / "work" / "stages").exists()
    return capsys.readouterr().err


def test_an_unreachable_tracking_server_is_reported_before_anything_starts(
    pile: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = small_values(pile, tracking={"uri": "http://127.0.0.1:9"})
    text = refused(values, tmp_path, capsys, code=1)  # transient: it may succeed later
    assert "tracking server http://127.0.0.1:9 does not answer" in text
    assert "start the server" in text


def test_several_nodes_are_not_one_machine(
    pile: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = small_values(pile, pretrain__topology={"num_nodes": 2})
    text = refused(values, tmp_path, capsys)
    assert "pretrain.topology.num_nodes: 2 is more than this one machine" in text


def test_without_a_docker_engine_its_runner_is_refused(
    pile: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("DOCKER_HOST", "unix:///no/such/socket")
    text = refused(small_values(pile), tmp_path, capsys, "--runner", "docker")
    assert "no Docker engine answers" in text


def test_a_work_directory_that_cannot_be_made_is_named(
    pile: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = write_spec(small_values(pile), tmp_path / "spec.yaml")
    assert main(["run", str(spec), "--workdir", "/proc/dinopipe"]) == 2
    assert "work directory /proc/dinopipe cannot be written to" in capsys.readouterr().err
