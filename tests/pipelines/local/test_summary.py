from __future__ import annotations

import json
from pathlib import Path

from components.runtime.context import RunContext
from components.runtime.manifests import AuditReport, DatasetManifest, EvaluationReport
from components.runtime.progress import Progress
from pipelines.local.run import LocalRun
from pipelines.local.summary import result_of, summary_rows, write_result
from pipelines.spec.pipeline_spec import load_spec
from tests.pipelines.specs import small_values, write_spec


def local_run(folder: Path, *progress: Progress) -> LocalRun:
    context = RunContext(workdir=str(folder), run_id="r", run_name="r")
    context.progress_directory.mkdir(parents=True)
    for item in progress:
        path = context.progress_directory / f"{item.stage}.json"
        path.write_text(item.model_dump_json())
    return LocalRun(
        context=context, succeeded=False, seconds=3.0, parent_run_id="p", log=folder / "log"
    )


def test_a_killed_stage_is_named_and_finished_ones_keep_their_numbers(tmp_path: Path) -> None:
    dataset = DatasetManifest(
        uri=str(tmp_path), sha256="1", config_sha256="2", num_images=5, num_kept=4,
        reasons={"truncated": 1}, table_uri="t", shards_uri="s", num_shards=1, size_bytes=9,
        audit=AuditReport(
            exact_recall=1.0, near_recall=0.9, leak_recall=1.0, corrupt_recall=1.0, distinct_lost=0.0
        ),
    )  # fmt: skip
    dataset.write(tmp_path / "dataset.json")
    run = local_run(
        tmp_path,
        Progress(stage="curate", state="succeeded", manifest_uri=str(tmp_path / "dataset.json")),
        Progress(stage="pretrain", state="running", task="training"),
    )
    spec = load_spec(write_spec(small_values(tmp_path), tmp_path / "spec.yaml"))
    result = result_of(spec, run)
    assert result.status == "failed"
    assert result.failed_stage == "pretrain"
    assert "ended without a word during training" in result.stages["pretrain"].error
    assert result.metrics["curate/audit/near_recall"] == 0.9
    rows = summary_rows(result)
    assert "4 of 5 kept; set aside: 1 truncated" in rows[0][2]
    assert "90.0% of near copies" in rows[0][2]
    written = json.loads(Path(write_result(result, str(tmp_path))).read_text())
    assert written["mlflow"]["model_version"] is None


def test_scores_stand_beside_their_baselines(tmp_path: Path) -> None:
    report = EvaluationReport(
        uri=str(tmp_path), sha256="1", config_sha256="2", evaluation_sha256="3", pictures=(),
        metrics={"a/knn_top1": 0.8, "a/knn_top1_untrained": 0.5, "a/knn_top1_pixels": 0.79},
    )  # fmt: skip
    report.write(tmp_path / "report.json")
    run = local_run(
        tmp_path,
        Progress(stage="evaluate", state="succeeded", manifest_uri=str(tmp_path / "report.json")),
    )
    spec = load_spec(write_spec(small_values(tmp_path), tmp_path / "spec.yaml"))
    (row,) = summary_rows(result_of(spec, run))
    assert row[2] == "a/knn_top1 80.0% (untrained 50.0%, raw pixels 79.0%)"
