"""The frame of every stage: identity, reuse of finished work, tracking, errors, outputs."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from components.runtime.context import RunContext
from components.runtime.copying import Copier
from components.runtime.lease import leased
from components.runtime.logging import set_up_logging
from components.runtime.manifests import Manifest, Parent, digest_of
from components.runtime.outputs import write_executor_output
from components.runtime.processes import die_with_parent, exclusive_directory
from components.runtime.progress import Reporter
from components.runtime.storage import (
    LOCK_FILES,
    StorageError,
    delete,
    download,
    exists,
    is_remote,
    join_uri,
    list_names,
    read_text,
    upload,
    write_text,
)
from components.runtime.tracking import (
    TRACKING_ERRORS,
    StageRun,
    Tracker,
    TrackingUnreachable,
    join_injected_run,
    package_version,
)
from dinov2_core.config.frozen import Frozen

logger = logging.getLogger(__name__)

Output = TypeVar("Output", bound=Manifest)

WRONG_INPUT = 2
"""Exit code for what a person can put right."""


class StageFailed(Exception):
    """A process that the stage started failed; the message is what the person should read."""


FOR_PEOPLE = (ValueError, StorageError, TrackingUnreachable, StageFailed)
"""Errors whose message says all that is needed; others are shown with their traceback."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageContext:
    """What a stage's work may use."""

    directory: Path
    """Kept between attempts of the same work; outputs go here."""
    lock: int
    """Descriptor of the directory's lock, for processes that shall hold it as well."""
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

    def uri(self, path: Path) -> str:
        """What a manifest calls a place below the directory."""
        return self.context.uri_of(path)

    def download(self, uri: str) -> Path:
        """Where on this node a place is that a manifest names; see `storage.download`."""

        def progress(done: int, total: int) -> None:
            if total:
                self.report("fetching", done // 10**6, total // 10**6, unit="megabyte")

        return download(uri, progress=progress)


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
    work: Callable[[StageContext], Output]
    """Does it."""
    metrics: Callable[[Output], dict[str, float]]
    """Numbers to show for a manifest."""
    holds: Callable[[Output, StageRun], bool] = lambda manifest, _: exists(manifest.uri)
    """Whether what an earlier manifest describes is still there."""
    complete_tracking: Callable[[Output, StageRun], None] = lambda *_: None
    """Sends to MLflow what the work could not, whether it was done now or is reused."""
    scratch: tuple[str, ...] = ()
    """Names in the directory that no other stage reads, and that a store does not get."""


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
    """The run context, with Kubeflow's run identity and MLflow run where none was given.

    On this machine the identity is given, so that variables of a person's shell join nothing.
    """
    context = RunContext.model_validate_json(args.context)
    if args.kubeflow_run and not context.run_id:
        context = join_injected_run(context, os.environ)
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
    path = context.progress_directory / f"{name}.json"
    with Copier({path: context.uri_of(path)}):
        report = Reporter(path, stage=name)
        report("checking", 0, 1, unit="step")
        try:
            stage = prepare(args)
            attempt = _Attempt.of(name, stage, context=context)
        except BaseException as error:
            report.finish("failed", detail=_said(error))
            raise
        _finish(attempt, args=args, report=report)
    return 0


def _finish(attempt: _Attempt[Output], *, args: argparse.Namespace, report: Reporter) -> None:
    """Bring an attempt to its end and tell everybody how it went."""
    try:
        manifest, is_cached = attempt.result(report)
        attempt.stage.complete_tracking(manifest, attempt.run)
        numbers = attempt.stage.metrics(manifest)
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
    report.finish("cached" if is_cached else "succeeded", manifest_uri=attempt.finished)


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
        run = Tracker(context).stage(name, key=key[:16])
        return cls(stage=stage, context=context, directory=directory, run=run, parents=parents)

    @property
    def home(self) -> str:
        """The directory as all nodes call it."""
        return self.context.uri_of(self.directory)

    @property
    def finished(self) -> str:
        """Manifest that is written last."""
        return join_uri(self.home, "manifest.json")

    def result(self, report: Reporter) -> tuple[Output, bool]:
        """The manifest, and whether it was there already."""
        manifest = self._earlier_result()
        if manifest is not None:
            return manifest, True
        with self._held() as lock:
            self._forget_unless_cached()
            manifest = self._earlier_result()  # somebody may have held it for that very work
            if manifest is not None:
                return manifest, True
            delete(self.finished)
            manifest = self._work(report, lock=lock)
            upload(self.directory, self.home, leaving_out=self.stage.scratch)
            write_text(self.finished, manifest.model_dump_json(indent=2) + "\n")
        return manifest, False

    def _earlier_result(self) -> Output | None:
        """The manifest of finished work that may be taken over."""
        text = read_text(self.finished)
        if text is None or not (self.context.use_cache or self._is_ours()):
            return None
        manifest = self.stage.manifest_type.of(text, place=self.finished)
        if not self._is_at_home(manifest) or not self.stage.holds(manifest, self.run):
            logger.info("what %s describes is gone or was moved; doing it again", self.finished)
            return None
        self.run.set_tags({"dinopipe.cached_from": manifest.mlflow_run_id})
        return manifest

    def _is_at_home(self, manifest: Output) -> bool:
        """Whether a manifest's files lie where it does: a work directory may have been moved."""
        place = manifest.uri
        is_a_place = is_remote(place) or Path(place).is_absolute()
        return not is_a_place or place == self.home or place.startswith(self.home + "/")

    @contextmanager
    def _held(self) -> Iterator[int]:
        """Keep other runs out of the directory; gives the lock's descriptor."""
        with exclusive_directory(self.directory) as lock:
            if not is_remote(self.home):
                yield lock
                return
            with leased(join_uri(self.home, "lease.json"), owner=f"run {self.context.run_id}"):
                yield lock

    @property
    def _owner(self) -> str:
        return join_uri(self.home, "run_id")

    def _is_ours(self) -> bool:
        """Whether this run was the last to work here: a restart of the run continues it."""
        return read_text(self._owner) == self.context.run_id

    def _forget_unless_cached(self) -> None:
        """Without the cache, empty the directory once per run."""
        if not self.context.use_cache and not self._is_ours():
            stored = {name.partition("/")[0] for name in list_names(self.home)}
            here = {path.name for path in self.directory.iterdir()}
            for name in (stored | here).difference(LOCK_FILES):
                delete(join_uri(self.home, name))
        write_text(self._owner, self.context.run_id)

    def _work(self, report: Reporter, *, lock: int) -> Output:
        self.run.log_params(json.loads(self.stage.settings.model_dump_json()))
        place = StageContext(
            directory=self.directory,
            lock=lock,
            run=self.run,
            report=report,
            config_sha256=digest_of(self.stage.settings),
            parents=self.parents,
            context=self.context,
        )
        return self.stage.work(place)


def _said(error: BaseException) -> str:
    """An error as a person reads it: its own sentence if it is meant for people."""
    return str(error) if isinstance(error, FOR_PEOPLE) else f"{type(error).__name__}: {error}"


def _kind(manifest: Manifest) -> str:
    return str(getattr(manifest, "kind", type(manifest).__name__))
