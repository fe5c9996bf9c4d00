from __future__ import annotations

import io
from pathlib import Path

from rich.console import Console

from components.runtime.progress import Progress
from pipelines.local.display import progress_table, read_progress, summary_table


def drawn(table: object) -> str:
    file = io.StringIO()
    Console(file=file, width=160).print(table)
    return file.getvalue()


def write(folder: Path, progress: Progress) -> None:
    (folder / f"{progress.stage}.json").write_text(progress.model_dump_json())


def test_each_stage_shows_how_it_stands(tmp_path: Path) -> None:
    write(tmp_path, Progress(stage="curate", state="cached", seconds=2))
    write(
        tmp_path,
        Progress(
            stage="pretrain", task="training", done=30, total=120, unit="step", rate=143.2,
            seconds_left=80, detail="loss 10.21",
        ),
    )  # fmt: skip
    lines = drawn(progress_table(tmp_path)).splitlines()
    assert "taken over from an earlier run" in lines[0]
    assert "30/120 steps · loss 10.21 · 143 images/s" in lines[1]
    assert "1 min 20 s left" in lines[1]
    assert [line.split()[1] for line in lines[2:5]] == ["finetune", "evaluate", "register"]


def test_an_absent_or_torn_file_is_no_progress(tmp_path: Path) -> None:
    assert read_progress(tmp_path, "curate") is None
    (tmp_path / "curate.json").write_text('{"stage": "cu')
    assert read_progress(tmp_path, "curate") is None


def test_the_summary_has_a_row_per_stage() -> None:
    text = drawn(summary_table([("curate", "3 s", "10 of 12 kept", "runs/x")]))
    assert "10 of 12 kept" in text
