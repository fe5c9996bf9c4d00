"""The work directory of runs on this machine: one run at a time, and the identity of the last."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from pydantic import ValidationError

from components.runtime.context import RunContext
from components.runtime.lease import leased
from components.runtime.manifests import digest_of
from components.runtime.storage import is_remote, join_uri, local_path, read_text, write_text
from dinov2_core.config.frozen import Frozen
from dinov2_core.errors import SettingsError
from pipelines.spec.pipeline_spec import PipelineSpec

logger = logging.getLogger(__name__)

STATE = "state.json"
"""File of the work directory that holds the identity of its last run."""
RESULT = "run.json"
"""File of the work directory that says how its last run ended."""


class _LastRun(Frozen):
    """What the state file holds."""

    identity: str
    """Digest of what was run."""
    run_id: str
    """Identity of the run."""
    status: str
    """How it is, or how it ended."""


@contextlib.contextmanager
def exclusive_workdir(workdir: str) -> Iterator[None]:
    """Make the work directory and keep other runs out of it.

    Raises:
        SettingsError: It cannot be written to, or another run of this machine is using it.
        InputError: A run of another machine is using it.
        LeaseLost: A run of another machine has taken it meanwhile.
        StoreUnavailable, StoreRefused: The store does not answer, or refuses.
    """
    advice = "choose another with --workdir"
    root = local_path(workdir)
    try:
        root.mkdir(parents=True, exist_ok=True)
        lock = (root / ".lock").open("w")
    except OSError as error:
        raise SettingsError(
            f"work directory {root} cannot be written to ({error.strerror}); {advice}"
        ) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise SettingsError(
                f"another run is using {workdir}; wait for it, or {advice}"
            ) from error
        if not is_remote(workdir):
            yield
            return
        owner = f"machine {socket.gethostname()}"
        with leased(join_uri(workdir, "lease.json"), owner=owner, waits_for_owner=True):
            yield


def absolute_workdir(workdir: str) -> str:
    """A work directory as all stages can use it."""
    return workdir.rstrip("/") if is_remote(workdir) else str(Path(workdir).resolve())


def context_for(
    spec: PipelineSpec, *, workdir: str, use_cache: bool, profile_steps: int = 0
) -> RunContext:
    """The context of a run: a new identity, or that of the same run if it did not finish."""
    use_cache = use_cache and spec.use_cache
    spec_sha256 = digest_of(spec)
    run_id = f"{spec.name}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    last = _last_run(workdir)
    if last is not None and last.status != "succeeded":
        is_same = last.identity == _identity(spec_sha256, use_cache=use_cache)
        run_id = last.run_id if is_same else run_id
    return RunContext(
        workdir=workdir,
        run_id=run_id,
        run_name=spec.name,
        tracking_uri=spec.tracking.uri,
        experiment=spec.tracking.experiment,
        use_cache=use_cache,
        spec_sha256=spec_sha256,
        profile_steps=profile_steps,
    )


def write_state(context: RunContext, *, status: str) -> None:
    """Note the run and how it is, for the next one in the same work directory."""
    identity = _identity(context.spec_sha256, use_cache=context.use_cache)
    state = _LastRun(identity=identity, run_id=context.run_id, status=status)
    write_text(join_uri(context.workdir, STATE), state.model_dump_json() + "\n")


def _identity(spec_sha256: str, *, use_cache: bool) -> str:
    return digest_of({"spec": spec_sha256, "use_cache": use_cache})


def _last_run(workdir: str) -> _LastRun | None:
    uri = join_uri(workdir, STATE)
    text = read_text(uri)
    if text is None:
        return None
    try:
        return _LastRun.model_validate_json(text)
    except ValidationError:
        logger.warning("%s is damaged; this run gets an identity of its own", uri)
        return None
