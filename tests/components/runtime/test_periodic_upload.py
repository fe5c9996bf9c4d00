"""periodic_upload: what grows here is copied to the store, and no work waits for it."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from components.runtime.periodic_upload import PeriodicUpload
from components.runtime.storage import list_names, local_path, read_text

HOME = "s3://pile/stages/pretrain/0"


def test_files_are_copied_while_they_grow_and_at_the_end(s3: str) -> None:
    root = local_path(HOME)
    targets = {root / "metrics.jsonl": f"{HOME}/metrics.jsonl", root / "health": f"{HOME}/health"}
    with PeriodicUpload(targets, interval_seconds=0.05):
        (root / "health").mkdir(parents=True)
        (root / "metrics.jsonl").write_text("1\n")
        deadline = time.monotonic() + 20
        while read_text(f"{HOME}/metrics.jsonl") != "1\n":
            assert time.monotonic() < deadline
            time.sleep(0.02)
        (root / "metrics.jsonl").write_text("1\n2\n")
        (root / "health" / "health.html").write_text("page")
    assert read_text(f"{HOME}/metrics.jsonl") == "1\n2\n"
    assert list_names(HOME) == ["health/health.html", "metrics.jsonl"]


def test_a_dead_store_stops_no_work(
    s3: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = local_path(f"{HOME}/metrics.jsonl")
    path.parent.mkdir(parents=True)
    path.write_text("1")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "")
    with PeriodicUpload({path: f"{HOME}/metrics.jsonl"}):
        pass
    assert "not copied to the store: " in caplog.text


def test_targets_that_are_paths_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("1")
    with PeriodicUpload({tmp_path / "a": str(tmp_path / "a")}, interval_seconds=0.01):
        time.sleep(0.05)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
