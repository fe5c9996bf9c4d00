"""How a run ended: the table for people and run.json for scripts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

from components.runtime.manifests import (
    CheckpointManifest,
    DatasetManifest,
    EvaluationReport,
    Manifest,
    Registration,
)
from components.runtime.progress import Progress, duration
from components.runtime.storage import download, join_uri, write_text
from dinov2_core.config.frozen import Frozen
from pipelines.local.display import read_progress
from pipelines.local.run import RESULT, LocalRun
from pipelines.spec.pipeline_spec import STAGES, PipelineSpec

MANIFESTS: dict[str, type[Manifest]] = {
    "curate": DatasetManifest,
    "pretrain": CheckpointManifest,
    "finetune": CheckpointManifest,
    "evaluate": EvaluationReport,
    "register": Registration,
}


class StageResult(Frozen):
    """How one stage ended."""

    seconds: float
    cached: bool
    state: str
    manifest: str
    """Place of its manifest; empty if it did not finish."""
    error: str = ""


class MlflowPlace(Frozen):
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

    status: Literal["succeeded", "failed"]
    run_id: str
    seconds: float
    stages: dict[str, StageResult]
    metrics: dict[str, float]
    mlflow: MlflowPlace
    log: str

    @property
    def failed_stage(self) -> str | None:
        """The stage that ended the run."""
        broken = [n for n, s in self.stages.items() if s.state not in ("succeeded", "cached")]
        return broken[0] if broken else None


def result_of(spec: PipelineSpec, run: LocalRun) -> RunResult:
    """Gather what the stages left behind."""
    stages: dict[str, StageResult] = {}
    metrics: dict[str, float] = {}
    registration: Registration | None = None
    for stage in STAGES:
        progress = read_progress(run.context.progress_directory, stage)
        if progress is None:
            continue
        stages[stage] = _stage_result(progress)
        if progress.manifest_uri:
            manifest = MANIFESTS[stage].read(download(progress.manifest_uri))
            metrics.update(_metrics(stage, manifest))
            if isinstance(manifest, Registration):
                registration = manifest
    finished = all(stage in stages and stages[stage].manifest for stage in STAGES)
    return RunResult(
        status="succeeded" if run.succeeded and finished else "failed",
        run_id=run.context.run_id,
        seconds=round(run.seconds, 1),
        stages=stages,
        metrics=metrics,
        mlflow=MlflowPlace(
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
    """Write run.json; gives its place."""
    place = join_uri(workdir, RESULT)
    write_text(place, json.dumps(result.model_dump(mode="json"), indent=2) + "\n")
    return place


def _stage_result(progress: Progress) -> StageResult:
    error = progress.detail if progress.state == "failed" else ""
    if progress.state == "running":
        error = (
            f"ended without a word during {progress.task or 'its start'} (killed, or out of memory)"
        )
    return StageResult(
        seconds=round(progress.seconds, 1),
        cached=progress.state == "cached",
        state=progress.state,
        manifest=progress.manifest_uri,
        error=error,
    )


def _metrics(stage: str, manifest: Manifest) -> dict[str, float]:
    match manifest:
        case DatasetManifest():
            numbers = {
                "num_images": float(manifest.num_images),
                "num_kept": float(manifest.num_kept),
            }
            numbers |= {f"set_aside/{k}": float(v) for k, v in manifest.reasons.items()}
            if manifest.audit is not None:
                numbers |= {f"audit/{k}": v for k, v in manifest.audit.model_dump().items()}
        case CheckpointManifest():
            numbers = {
                **{f"loss/{name}": value for name, value in manifest.final_losses.items()},
                "images_per_second": manifest.images_per_second,
                "step": float(manifest.step),
            }
        case EvaluationReport():
            return dict(manifest.metrics)
        case _:
            return {}
    return {f"{stage}/{name}": value for name, value in numbers.items()}


def summary_rows(result: RunResult) -> list[tuple[str, str, str, str]]:
    """Rows of the summary table: stage, time, key numbers, place."""
    rows = []
    for stage, ended in result.stages.items():
        time = duration(ended.seconds) + (" (taken over)" if ended.cached else "")
        if not ended.manifest:
            rows.append((stage, time, ended.state, ""))
            continue
        manifest = MANIFESTS[stage].read(download(ended.manifest))
        rows.append((stage, time, "\n".join(_key_numbers(manifest)), _shown(manifest)))
    return rows


def _shown(manifest: Manifest) -> str:
    path = Path(manifest.uri)
    if not path.is_absolute():
        return manifest.uri
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def _key_numbers(manifest: Manifest) -> list[str]:
    match manifest:
        case DatasetManifest():
            reasons = ", ".join(f"{count} {name}" for name, count in manifest.reasons.items())
            lines = [f"{manifest.num_kept} of {manifest.num_images} kept; set aside: {reasons}"]
            audit = manifest.audit
            if audit is not None:
                lines.append(
                    f"found of what was planted: {audit.exact_recall:.1%} of exact copies, "
                    f"{audit.near_recall:.1%} of near copies, {audit.leak_recall:.1%} of leaks, "
                    f"{audit.corrupt_recall:.1%} of corrupt files; "
                    f"{audit.distinct_lost:.2%} of distinct images lost"
                )
            return lines
        case CheckpointManifest():
            losses = ", ".join(f"{k} {v:.3f}" for k, v in manifest.final_losses.items())
            return [
                f"{manifest.step} steps at {manifest.teacher.image_size_pixels} px, "
                f"{manifest.images_per_second:.0f} images/s; {losses}"
            ]
        case EvaluationReport():
            return _scores(manifest.metrics)
        case Registration():
            return [f"version {manifest.model_version} is {manifest.alias}: {manifest.decision}"]
        case _:
            return []


def _scores(metrics: dict[str, float]) -> list[str]:
    lines = []
    for name, value in metrics.items():
        untrained, pixels = metrics.get(f"{name}_untrained"), metrics.get(f"{name}_pixels")
        if untrained is not None and pixels is not None:
            lines.append(f"{name} {value:.1%} (untrained {untrained:.1%}, raw pixels {pixels:.1%})")
    return lines or [f"{name} {value:.4g}" for name, value in metrics.items()]
