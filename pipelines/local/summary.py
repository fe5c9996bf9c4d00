"""How a run ended: rows of a table for the user, and run.json for scripts."""

from __future__ import annotations

import json
from pathlib import Path

from components.runtime.manifests import Registration
from components.runtime.progress import Progress, duration
from components.runtime.storage import download, join_uri, write_text
from dinov2_core.config.frozen import Frozen
from pipelines.local.display import read_progress
from pipelines.local.run import LocalRun, Outcome
from pipelines.local.workdir import RESULT
from pipelines.spec.pipeline_spec import STAGES, PipelineSpec

FINISHED = ("succeeded", "cached")


class StageResult(Frozen):
    """How one stage ended."""

    seconds: float
    cached: bool
    state: str
    manifest: str
    """URI of its manifest; empty if it did not finish."""
    outputs: str
    """Directory, file or address of what it made; empty if it did not finish."""
    summary: str
    """Its key numbers, ready to show; empty if it did not finish."""
    error: str = ""


class MlflowRecord(Frozen):
    """Where the run and the model are recorded."""

    tracking_uri: str
    experiment: str
    run_id: str
    model_name: str
    model_version: int | None
    alias: str | None
    decision: str | None


class RunResult(Frozen):
    """What run.json holds."""

    status: Outcome
    run_id: str
    seconds: float
    stages: dict[str, StageResult]
    metrics: dict[str, float]
    mlflow: MlflowRecord
    log: str

    @property
    def failed_stage(self) -> str | None:
        """The stage that ended the run."""
        return next((n for n, s in self.stages.items() if s.state not in FINISHED), None)


def result_of(spec: PipelineSpec, run: LocalRun) -> RunResult:
    """Gather the results that the stages reported."""
    stages: dict[str, StageResult] = {}
    metrics: dict[str, float] = {}
    registration: Registration | None = None
    for stage in STAGES:
        progress = read_progress(run.context.progress_directory, stage)
        if progress is None:
            continue
        stages[stage] = _stage_result(progress, run.outcome)
        metrics |= {_full_name(stage, name): value for name, value in progress.numbers.items()}
        if stage == "register" and progress.manifest_uri:
            registration = Registration.read(download(progress.manifest_uri))
    is_complete = all(stage in stages and stages[stage].manifest for stage in STAGES)
    return RunResult(
        status="failed" if run.outcome == "succeeded" and not is_complete else run.outcome,
        run_id=run.context.run_id,
        seconds=round(run.seconds, 1),
        stages=stages,
        metrics=metrics,
        mlflow=MlflowRecord(
            tracking_uri=run.context.resolved_tracking_uri,
            experiment=run.context.experiment,
            run_id=run.parent_run_id,
            model_name=spec.registry.model_name,
            model_version=registration.model_version if registration else None,
            alias=registration.alias if registration else None,
            decision=registration.decision if registration else None,
        ),
        log=str(run.log),
    )


def write_result(result: RunResult, workdir: str) -> str:
    """Write run.json; gives its path or URI."""
    uri = join_uri(workdir, RESULT)
    write_text(uri, json.dumps(result.model_dump(mode="json"), indent=2) + "\n")
    return uri


def _full_name(stage: str, name: str) -> str:
    """Name of a stage's number among those of all stages; an evaluation's begin with its set."""
    return name if stage == "evaluate" else f"{stage}/{name}"


def _stage_result(progress: Progress, outcome: Outcome) -> StageResult:
    is_finished = bool(progress.manifest_uri)
    error = "" if is_finished else progress.detail
    if progress.state == "running" and outcome == "interrupted":
        error = outcome
    elif progress.state == "running":
        task = progress.task or "its start"
        error = f"ended during {task} without an error of its own (killed, or out of memory)"
    return StageResult(
        seconds=round(progress.seconds, 1),
        cached=progress.state == "cached",
        state=outcome if error and outcome == "interrupted" else progress.state,
        manifest=progress.manifest_uri,
        outputs=progress.outputs,
        summary=progress.detail if is_finished else "",
        error=error,
    )


def summary_rows(result: RunResult) -> list[tuple[str, str, str, str]]:
    """Rows of the summary table: stage, time, key numbers, outputs."""
    return [
        (
            stage,
            duration(ended.seconds) + (" (reused)" if ended.cached else ""),
            ended.summary if ended.manifest else ended.state,
            _relative_to_here(ended.outputs),
        )
        for stage, ended in result.stages.items()
    ]


def _relative_to_here(uri: str) -> str:
    path, here = Path(uri), Path.cwd()
    is_below = path.is_absolute() and path.is_relative_to(here)
    return str(path.relative_to(here)) if is_below else uri
