from __future__ import annotations

from pathlib import Path

import pytest

from components.runtime.manifests import Registration
from components.runtime.progress import Progress, Reporter, duration


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(3.4, "3 s"), (65, "1 min 05 s"), (3600, "1 h 00 min"), (7300, "2 h 01 min")],
)
def test_durations_read_like_speech(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_the_file_says_how_far_and_how_it_ended(tmp_path: Path) -> None:
    path = tmp_path / "curate.json"
    report = Reporter(path, stage="curate")
    report("reading", 0, 10)
    report("reading", 10, 10)
    progress = Progress.model_validate_json(path.read_text())
    assert (progress.task, progress.done, progress.total, progress.state) == (
        "reading", 10, 10, "running",
    )  # fmt: skip
    report.finish("failed", detail="no images")
    ended = Progress.model_validate_json(path.read_text())
    assert (ended.state, ended.detail) == ("failed", "no images")


def test_a_finished_stage_reports_its_numbers_and_where_they_are(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="components.runtime.progress")
    manifest = Registration(
        uri="models:/m/3", sha256="1", config_sha256="2", model_name="m", model_version=3,
        alias="champion", decision="0.9 is enough", tracking_uri="",
    )  # fmt: skip
    report = Reporter(tmp_path / "p.json", stage="register")
    report.finish("succeeded", manifest=manifest, manifest_uri="/w/manifest.json")
    ended = Progress.model_validate_json((tmp_path / "p.json").read_text())
    assert ended.numbers == {"model_version": 3.0}
    assert (ended.outputs, ended.manifest_uri) == ("models:/m/3", "/w/manifest.json")
    assert ended.detail == "version 3 is champion: 0.9 is enough"
    assert caplog.messages == [f"[register] succeeded after 0 s: {ended.detail}"]


def test_many_reports_write_few_lines(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="components.runtime.progress")
    report = Reporter(tmp_path / "p.json", stage="s")
    for done in range(1000):
        report("work", done, 1000)
    assert len(caplog.records) == 1


def test_a_line_has_the_numbers() -> None:
    line = Progress(
        stage="pretrain", task="training", done=3, total=9, unit="step", rate=120.4,
        seconds_left=61, detail="loss 9.1",
    ).line  # fmt: skip
    assert line == "[pretrain] training · step 3/9 · loss 9.1 · 120 images/s · 1 min 01 s left"
