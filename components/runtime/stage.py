"""The frame of every stage: identity, reuse of finished work, tracking, errors, outputs."""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from components.runtime.context import RunContext
from components.runtime.logging import set_up_logging
from components.runtime.manifests import Manifest, Parent, digest_of, write_atomically
from components.runtime.outputs import write_executor_output
from components.runtime.processes import die_with_parent
from components.runtime.progress import Reporter
from components.runtime.storage import StorageError
from components.runtime.tracking import (
    TRACKING_ERRORS,
    StageRun,
    Tracker,
    TrackingUnreachable,
    package_version,
)
from dinov2_core.config import Frozen

logger = logging.getLogger(__name__)

Output = TypeVar("Output", bound=Manifest)

WRONG_INPUT = 2
"""Exit code for what a person can put right."""


class StageFailed(Exception):
    """A process that the stage started failed; the message is what the person should read."""


FOR_PEOPLE = (ValueError, StorageError, TrackingUnreachable, StageFailed)
"""Errors whose message says all that is needed; others are shown with their traceback."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Workplace:
    """What a stage's work may use."""

    directory: Path
    """Kept between attempts of the same work; outputs go here."""
    run: StageRun
    """MLflow run of the stage."""
    report: Reporter
    """Progress."""
    config_sha256: str
    """For the manifest."""
    parents: tuple[Parent, ...]
    """For the manifest."""
    context: RunContext
    """Of the pipeline run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage(Generic[Output]):
    """One stage's work and what identifies it."""

    manifest_type: type[Output]
    """What it writes."""
    settings: Frozen
    """Logged as parameters."""
    identity: object
    """Settings that may change the result, without places, and digests of what it reads."""
    parents: tuple[Manifest, ...]
    """Manifests it reads."""
    work: Callable[[Workplace], Output]
    """Does it."""
    metrics: Callable[[Output], dict[str, float]]
    """Numbers to show for a manifest."""
    holds: Callable[[Output, StageRun], bool] = lambda manifest, _: Path(manifest.uri).exists()
    """Whether what an earlier manifest describes is still there."""


def stage_parser(description: str, *inputs: str) -> argparse.ArgumentParser:
    """The flags that every stage has, and one for each manifest that it reads."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--config", required=True, help="settings of the stage, JSON")
    parser.add_argument("--context", required=True, help="work directory and tracking, JSON")
    for name in inputs:
        parser.add_argument(f"--{name}", required=True, type=Path, help=f"manifest: {name}")
    parser.add_argument("--output", required=True, type=Path, help="manifest to write")
    parser.add_argument("--kubeflow-run", default="", help="identity of the Kubeflow run")
    parser.add_argument("--executor-input", default="", help="what Kubeflow says of the outputs")
    return parser


def context_of(args: argparse.Namespace) -> RunContext:
    """The run context, with Kubeflow's run identity where none was given."""
    context = RunContext.model_validate_json(args.context)
    run_id = context.run_id or args.kubeflow_run or "by-hand"
    return context.model_copy(update={"run_id": run_id})


def entry_point(name: str, main: Callable[[], int]) -> int:
    """Run a stage's `main` so that a person sees its error last; gives the exit code."""
    set_up_logging()
    if os.environ.get("DINOPIPE_DIE_WITH_PARENT"):
        die_with_parent()
    try:
        return main()
    except FOR_PEOPLE as error:
        logger.error("%s: %s", name, error)
        return 1 if isinstance(error, StageFailed) else WRONG_INPUT
    except Exception:
        traceback.print_exc(file=sys.stderr)
        return 1


def run_stage(
    name: str, *, args: argparse.Namespace, prepare: Callable[[argparse.Namespace], Stage[Output]]
) -> int:
    """Do a stage's work, or take over what an equal stage has done, and write its manifest.

    A stage with the same settings, the same inputs and the same program version has the same
    directory; a manifest in it means that it is finished.

    Args:
        name: Name of the task in the pipeline.
        args: Parsed flags of `stage_parser`.
        prepare: Reads settings and manifests and says what is to be done; it raises ValueError
            for what a person can put right.
    """
    context = context_of(args)
    report = Reporter(context.progress_directory / f"{name}.json", stage=name)
    report("checking", 0, 1, unit="step")
    try:
        stage = prepare(args)
        attempt = _Attempt.of(name, stage, context=context)
    except BaseException as error:
        report.finish("failed", detail=_said(error))
        raise
    try:
        manifest, is_cached = attempt.result(report)
        numbers = stage.metrics(manifest)
        attempt.run.log_metrics(numbers)
        manifest.write(args.output)
        write_executor_output(args.executor_input, manifest=manifest, metrics=numbers)
    except BaseException as error:
        report.finish("failed", detail=_said(error))
        with suppress(*TRACKING_ERRORS):  # the server's death must not hide what went wrong
            attempt.run.set_tags({"dinopipe.error": _said(error)})
            attempt.run.end("KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
        raise
    attempt.run.end("FINISHED")
    report.finish("cached" if is_cached else "succeeded", manifest_uri=str(attempt.finished))
    return 0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Attempt(Generic[Output]):
    """One attempt at a stage's work: its directory and its MLflow run."""

    stage: Stage[Output]
    context: RunContext
    directory: Path
    run: StageRun
    parents: tuple[Parent, ...]

    @classmethod
    def of(cls, name: str, stage: Stage[Output], *, context: RunContext) -> _Attempt[Output]:
        """Find the directory that belongs to the work, and open the run."""
        parents = tuple(Parent(kind=_kind(m), sha256=m.sha256) for m in stage.parents)
        key = digest_of(
            {
                "stage": name,
                "version": package_version("dinopipe"),
                "identity": stage.identity,
                "parents": [parent.sha256 for parent in parents],
            }
        )
        directory = context.stage_directory(name, key)
        _forget_unless_cached(directory, context)
        run = Tracker(context).stage(name, key=key[:16])
        return cls(stage=stage, context=context, directory=directory, run=run, parents=parents)

    @property
    def finished(self) -> Path:
        """Manifest that is written last."""
        return self.directory / "manifest.json"

    def _is_at_home(self, manifest: Output) -> bool:
        """Whether a manifest's files lie where it does: a work directory may have been moved."""
        place = Path(manifest.uri)
        return not place.is_absolute() or place.is_relative_to(self.directory)

    def result(self, report: Reporter) -> tuple[Output, bool]:
        """The manifest, and whether it was there already."""
        stage, run = self.stage, self.run
        if self.finished.exists():
            manifest = stage.manifest_type.read(self.finished)
            if self._is_at_home(manifest) and stage.holds(manifest, run):
                run.set_tags({"dinopipe.cached_from": manifest.mlflow_run_id})
                return manifest, True
            logger.info("what %s describes is gone or was moved; doing it again", self.finished)
            self.finished.unlink()
        run.log_params(json.loads(stage.settings.model_dump_json()))
        place = Workplace(
            directory=self.directory,
            run=run,
            report=report,
            config_sha256=digest_of(stage.settings),
            parents=self.parents,
            context=self.context,
        )
        manifest = stage.work(place)
        manifest.write(self.finished)
        return manifest, False


def _said(error: BaseException) -> str:
    """An error as a person reads it: its own sentence if it is meant for people."""
    return str(error) if isinstance(error, FOR_PEOPLE) else f"{type(error).__name__}: {error}"


def _kind(manifest: Manifest) -> str:
    return str(getattr(manifest, "kind", type(manifest).__name__))


def _forget_unless_cached(directory: Path, context: RunContext) -> None:
    """Without the cache, empty the directory once per run: a restart of the run continues it."""
    owner = directory / "run_id"
    ours = owner.exists() and owner.read_text(encoding="utf-8") == context.run_id
    if not context.use_cache and directory.exists() and not ours:
        shutil.rmtree(directory)
    write_atomically(owner, context.run_id)
