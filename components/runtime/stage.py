"""The frame of every stage: identity, reuse of finished work, tracking, errors, outputs."""

from __future__ import annotations

import argparse
import json
import logging
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Literal, TypeVar

from pydantic import ValidationError

from components.runtime.context import RunContext
from components.runtime.file_errors import full_disk_explained
from components.runtime.interrupts import sigterm_like_interrupt
from components.runtime.lease import Lease, leased
from components.runtime.logging import log_error, set_up_logging
from components.runtime.manifests import Manifest, Parent, digest_of
from components.runtime.outputs import write_executor_output
from components.runtime.periodic_upload import PeriodicUpload
from components.runtime.processes import exclusive_directory
from components.runtime.progress import Reporter
from components.runtime.retry import ONCE, retrying_with
from components.runtime.storage import (
    LOCK_FILES,
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
from components.runtime.system_facts import package_version
from components.runtime.tracking import StageRun, Tracker, join_injected_run
from dinov2_core.config.frozen import Frozen
from dinov2_core.errors import (
    DinopipeError,
    InputError,
    LeaseLost,
    SettingsError,
    Stopped,
    message_of,
)

logger = logging.getLogger(__name__)

Output = TypeVar("Output", bound=Manifest)


@dataclass(frozen=True, slots=True, kw_only=True)
class StageContext:
    """What a stage's work gets from its frame."""

    directory: Path
    """Kept between attempts of the same work; outputs go here."""
    lock: int
    """Descriptor of the directory's lock, for processes that shall hold it as well."""
    run: StageRun
    """MLflow run of the stage."""
    report: Reporter
    """Takes the progress."""
    config_sha256: str
    """Digest of the settings, for the manifest."""
    parents: tuple[Parent, ...]
    """Manifests that the stage reads, for its own."""
    context: RunContext
    """What all stages of the pipeline run share."""

    def uri(self, path: Path) -> str:
        """Path or URI, for manifests, of what lies below the directory."""
        return self.context.uri_of(path)

    def download(self, uri: str) -> Path:
        """Path on this node of what a manifest names; see `storage.download`."""

        def progress(done: int, total: int) -> None:
            if total:
                self.report("downloading", done // 10**6, total // 10**6, unit="megabyte")

        return download(uri, progress=progress)


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage(Generic[Output]):
    """One stage's work and what identifies it."""

    manifest_type: type[Output]
    """Type of the manifest that it writes."""
    settings: Frozen
    """Logged as parameters."""
    identity: object
    """Settings that may change the result, without paths, and digests of what it reads."""
    parents: tuple[Manifest, ...]
    """Manifests it reads."""
    work: Callable[[StageContext], Output]
    """Makes what the manifest describes."""
    is_intact: Callable[[Output, StageRun], bool] = lambda manifest, _: exists(manifest.uri)
    """Whether what an earlier manifest describes is still there."""
    complete_tracking: Callable[[Output, StageRun], None] = lambda *_: None
    """Sends to MLflow what the work could not, whether it was done now or is reused."""
    scratch: tuple[str, ...] = ()
    """Names in the directory that no other stage reads, and that are not uploaded."""


def stage_parser(description: str, *inputs: str) -> argparse.ArgumentParser:
    """The flags that every stage has, and one for each manifest that it reads."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--config", required=True, help="settings of the stage, JSON")
    parser.add_argument("--context", required=True, help="work directory and tracking, JSON")
    for name in inputs:
        parser.add_argument(f"--{name}", required=True, type=Path, help=f"manifest: {name}")
    parser.add_argument("--output", required=True, type=Path, help="manifest to write")
    parser.add_argument("--kubeflow-run", default="", help="identity of the Kubeflow run")
    parser.add_argument("--executor-input", default="", help="outputs that Kubeflow expects, JSON")
    return parser


def context_of(args: argparse.Namespace) -> RunContext:
    """The run context, with Kubeflow's run identity and MLflow run where none was given.

    On this machine the identity is given, so that variables of the user's shell join nothing.

    Raises:
        SettingsError: The flag holds no context.
    """
    try:
        context = RunContext.model_validate_json(args.context)
    except ValidationError as error:
        raise SettingsError(f"--context is not valid: {error}") from error
    if args.kubeflow_run and not context.run_id:
        context = join_injected_run(context, os.environ)
    run_id = context.run_id or args.kubeflow_run or "by-hand"
    return context.model_copy(update={"run_id": run_id})


def entry_point(name: str, main: Callable[[], int]) -> int:
    """Run a stage's `main`; logs what ended it and gives the exit code that follows from it."""
    try:
        with sigterm_like_interrupt():
            set_up_logging()
            return main()
    except (Exception, KeyboardInterrupt) as error:
        return log_error(error, name=name)


def run_stage(
    name: str, *, args: argparse.Namespace, prepare: Callable[[argparse.Namespace], Stage[Output]]
) -> int:
    """Do a stage's work, or reuse what an equal stage has done, and write its manifest.

    A stage with the same settings, the same inputs and the same program version has the same
    directory; a manifest in it means that it is finished.

    Args:
        name: Name of the task in the pipeline.
        args: Parsed flags of `stage_parser`.
        prepare: Reads settings and manifests and describes the stage; it raises UserError for what
            the user can fix.
    """
    context = context_of(args)
    path = context.progress_directory / f"{name}.json"
    attempt: _Attempt[Output] | None = None
    with PeriodicUpload({path: context.uri_of(path)}):
        report = Reporter(path, stage=name)
        report("checking", 0, 1, unit="step")
        try:
            with full_disk_explained(context.root):
                attempt = _Attempt.of(name, _described(prepare, args), context=context)
                manifest, is_cached = attempt.result(report)
                attempt.stage.complete_tracking(manifest, attempt.run)
                attempt.run.log_results(manifest.numbers)
                manifest.write(args.output)
                write_executor_output(args.executor_input, manifest=manifest)
                attempt.run.end("FINISHED")
        except BaseException as error:
            report.finish("failed", detail=message_of(error))
            if attempt is not None:
                _end_failed(attempt.run, error)
            raise
        state: Literal["cached", "succeeded"] = "cached" if is_cached else "succeeded"
        report.finish(state, manifest=manifest, manifest_uri=attempt.manifest_uri)
    return 0


def _described(
    prepare: Callable[[argparse.Namespace], Stage[Output]], args: argparse.Namespace
) -> Stage[Output]:
    try:
        return prepare(args)
    except ValidationError as error:
        raise SettingsError(f"the stage's settings are not valid: {error}") from error


def _end_failed(run: StageRun, error: BaseException) -> None:
    """Record what ended a run; a server that has died must not hide it."""
    is_stopped = isinstance(error, KeyboardInterrupt | Stopped | LeaseLost)
    with retrying_with(ONCE), suppress(DinopipeError):
        run.set_tags({"dinopipe.error": message_of(error)})
        run.end("KILLED" if is_stopped else "FAILED")


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
    def uri(self) -> str:
        """The directory as all nodes call it."""
        return self.context.uri_of(self.directory)

    @property
    def manifest_uri(self) -> str:
        """Manifest that is written last."""
        return join_uri(self.uri, "manifest.json")

    def result(self, report: Reporter) -> tuple[Output, bool]:
        """The manifest, and whether it was there already."""
        manifest = self._earlier_result()
        if manifest is not None:
            return manifest, True
        with exclusive_directory(self.directory) as lock, self._lease() as lease:
            self._empty_unless_cached()
            manifest = self._earlier_result()  # another run may have been at that very work
            if manifest is not None:
                return manifest, True
            delete(self.manifest_uri)
            manifest = self._work(report, lock=lock)
            if lease is not None:
                lease.confirm()
            upload(self.directory, self.uri, leaving_out=self.stage.scratch)
            if lease is not None:
                lease.confirm()
            write_text(self.manifest_uri, manifest.model_dump_json(indent=2) + "\n")
        return manifest, False

    def _lease(self) -> AbstractContextManager[Lease | None]:
        """Keeps runs on other nodes out of a store's directory."""
        if not is_remote(self.uri):
            return nullcontext()
        owner = f"run {self.context.run_id}"
        return leased(join_uri(self.uri, "lease.json"), owner=owner, waits_for_owner=True)

    def _earlier_result(self) -> Output | None:
        """The manifest of finished work that may be reused."""
        text = read_text(self.manifest_uri)
        if text is None or not (self.context.use_cache or self._is_of_this_run()):
            return None
        try:
            manifest = self.stage.manifest_type.of(text, source=self.manifest_uri)
        except InputError:
            logger.warning("%s is damaged; redoing what it describes", self.manifest_uri)
            return None
        if not self._lies_here(manifest) or not self.stage.is_intact(manifest, self.run):
            logger.info("what %s describes is gone or was moved; redoing it", self.manifest_uri)
            return None
        self.run.set_tags({"dinopipe.cached_from": manifest.mlflow_run_id})
        return manifest

    def _lies_here(self, manifest: Output) -> bool:
        """Whether a manifest's files lie where it does: a work directory may have been moved."""
        is_location = is_remote(manifest.uri) or Path(manifest.uri).is_absolute()
        return not is_location or f"{manifest.uri}/".startswith(f"{self.uri}/")

    @property
    def _run_id_uri(self) -> str:
        """File that names the run which was the last to work here."""
        return join_uri(self.uri, "run_id")

    def _is_of_this_run(self) -> bool:
        """Whether this run was the last to work here: a restart of the run continues it."""
        return read_text(self._run_id_uri) == self.context.run_id

    def _empty_unless_cached(self) -> None:
        """Without the cache, empty the directory once per run."""
        if not self.context.use_cache and not self._is_of_this_run():
            stored = {name.partition("/")[0] for name in list_names(self.uri)}
            here = {path.name for path in self.directory.iterdir()}
            for name in (stored | here).difference(LOCK_FILES):
                delete(join_uri(self.uri, name))
        write_text(self._run_id_uri, self.context.run_id)

    def _work(self, report: Reporter, *, lock: int) -> Output:
        self.run.log_params(json.loads(self.stage.settings.model_dump_json()))
        return self.stage.work(
            StageContext(
                directory=self.directory,
                lock=lock,
                run=self.run,
                report=report,
                config_sha256=digest_of(self.stage.settings),
                parents=self.parents,
                context=self.context,
            )
        )


def _kind(manifest: Manifest) -> str:
    return str(getattr(manifest, "kind", type(manifest).__name__))
