"""A run on a cluster while and after it runs: state, waiting, logs, cancelling."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import kfp

from k8s.training import STAGE_LABEL
from pipelines.cluster.client import ClusterError, address_of, be_patient, fetch_text
from pipelines.spec.pipeline_spec import STAGES

SUCCEEDED = "SUCCEEDED"
RUN_LABEL = "workflows.argoproj.io/workflow"
"""Argo's label of a run's pods."""
ENDED = (SUCCEEDED, "FAILED", "CANCELED", "SKIPPED", "ERROR")
"""States after which nothing happens any more."""
POD_TEMPLATES = tuple(
    f"{metadata}{retried}system-container-impl"
    for metadata in ("metadata-0-2-", "metadata-0-3-", "metadata-0-4-", "")
    for retried in ("retry-", "")
)
"""Argo's names of the part of a task that runs the container: Kubeflow tells apart how many
annotations and labels its pod has, and whether it may be tried again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One stage of a run."""

    name: str
    state: str
    seconds: float | None
    """From start to end, or until now; None before the start."""
    reason: str
    """What the server says of its failure."""
    pods: tuple[str, ...]
    """Names of what ran its container, the last attempt last."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunState:
    """A run as the server knows it."""

    run_id: str
    name: str
    state: str
    reason: str
    """What the server says of its failure."""
    address: str
    tasks: tuple[Task, ...]
    """Stages that have begun, in the pipeline's order."""

    @property
    def has_ended(self) -> bool:
        """Whether nothing happens any more: succeeded, failed, canceled or skipped."""
        return self.state in ENDED

    @property
    def failed_task(self) -> Task | None:
        """The first stage that failed."""
        return next((task for task in self.tasks if task.state in ("FAILED", "ERROR")), None)


def state_of(client: kfp.Client, run_id: str) -> RunState:
    """Ask for a run.

    Raises:
        ClusterError: There is no such run, or the server does not answer.
    """
    be_patient(client)
    run = client.get_run(run_id)
    details = (run.run_details.task_details if run.run_details else None) or ()
    return RunState(
        run_id=run_id,
        name=run.display_name or "",
        state=run.state or "PENDING",
        reason=_reason(run),
        address=address_of(client, f"runs/details/{run_id}"),
        tasks=_tasks(details),
    )


def _tasks(details: Any) -> tuple[Task, ...]:
    by_name = {item.display_name: item for item in details if item.display_name in STAGES}
    nodes = {key: item for item in details for key in (item.task_id, item.pod_name) if key}
    return tuple(_task(by_name[name], nodes) for name in STAGES if name in by_name)


def _task(item: Any, nodes: Mapping[str, Any]) -> Task:
    below = _below(item, nodes)
    pods = [node for node in below if node.pod_name and not _children(node, nodes)]
    pods = [node for node in pods if not node.display_name.endswith("-driver")]
    pods.sort(key=lambda node: (node.start_time is not None, str(node.start_time)))
    reasons = [_reason(node) for node in (item, *below)]
    end = item.end_time if item.end_time and item.end_time.year > 1970 else datetime.now(tz=UTC)
    started = item.start_time
    return Task(
        name=item.display_name,
        state=item.state or "PENDING",
        seconds=max((end - started).total_seconds(), 0.0) if started else None,
        reason=next((reason for reason in reasons if reason), ""),
        pods=tuple(dict.fromkeys(node.pod_name for node in pods)),
    )


def _children(item: Any, nodes: Mapping[str, Any]) -> list[Any]:
    keys = [child.task_id or child.pod_name for child in item.child_tasks or ()]
    return [nodes[key] for key in keys if key in nodes and nodes[key] is not item]


def _below(item: Any, nodes: Mapping[str, Any]) -> list[Any]:
    """A task and all that belongs to it, without the stages that merely follow it."""
    found, waiting = [], [item]
    while waiting:
        node = waiting.pop()
        if node in found:
            continue
        found.append(node)
        own = (child for child in _children(node, nodes) if child.display_name not in STAGES)
        waiting.extend(child for child in own if not child.display_name.endswith("-driver"))
    return found


def _reason(item: Any) -> str:
    """The server's message, if it has one; the newest of the state's history otherwise."""
    errors = [item.error, *(past.error for past in reversed(item.state_history or ()))]
    texts = [error.message for error in errors if error is not None and error.message]
    return " ".join(texts[0].split()) if texts else ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Polling:
    """How often a run is asked for."""

    first_seconds: float = 2.0
    """Pause after a change."""
    longest_seconds: float = 30.0
    """Pauses grow up to this while nothing changes."""
    outage_seconds: float = 900.0
    """How long the server may fail to answer."""
    limit_seconds: float | None = None
    """How long to wait at all; None for as long as it takes."""


def wait(
    client: kfp.Client,
    run_id: str,
    *,
    polling: Polling | None = None,
    on_change: Callable[[RunState], None] = lambda _: None,
) -> RunState:
    """Wait until a run has ended, however it ends.

    Args:
        client: Any client.
        run_id: The run.
        polling: None for the defaults.
        on_change: Is given each new state of the run or of a stage.

    Raises:
        ClusterError: The run is unknown, or the server was silent for too long.
        TimeoutError: The limit passed; the run goes on.
    """
    polling = polling or Polling()
    began = answered = time.monotonic()
    pause, shown = polling.first_seconds, None
    while True:
        try:
            state = state_of(client, run_id)
        except ClusterError as error:
            if not error.may_pass or time.monotonic() - answered > polling.outage_seconds:
                raise
        else:
            answered = time.monotonic()
            seen = (state.state, [(task.name, task.state) for task in state.tasks])
            if seen != shown:
                on_change(state)
                pause, shown = polling.first_seconds, seen
            if state.has_ended:
                return state
        limit = polling.limit_seconds
        if limit is not None and time.monotonic() - began > limit:
            raise TimeoutError(
                f"run {run_id} has not ended within {limit:g} seconds and goes on; "
                f"dinopipe wait {run_id} takes up waiting again"
            )
        time.sleep(pause)
        pause = min(pause * 1.5, polling.longest_seconds)


def logs(client: kfp.Client, task: Task, *, run_id: str, namespace: str = "") -> str:
    """What the last attempt of a stage wrote.

    Args:
        client: Any client.
        task: Stage of `state_of`.
        run_id: Its run.
        namespace: Where its pods run; empty leaves it to the server.

    Raises:
        ClusterError: The server has no log of it, or gives none.
    """
    if not task.pods:
        raise ClusterError(f"{task.name} has no pod yet, so it has written nothing", status=404)
    failure: ClusterError | None = None
    for pod in (task.pods[-1], *_argo_pod_names(task.pods[-1])):
        place = {"podname": pod, "runid": run_id}
        place |= {"podnamespace": namespace} if namespace else {}
        # The API server's own address has the first, that of the user interface the second.
        for path, query in (
            (f"/apis/v1alpha1/runs/{run_id}/nodes/{pod}/log", {}),
            ("/k8s/pod/logs", place),
        ):
            try:
                return fetch_text(client, path, query)
            except ClusterError as error:
                failure = error if failure is None or error.status != 404 else failure
                if error.status in (0, 401, 403):
                    raise
    where = f" -n {namespace}" if namespace else ""
    workflow = task.pods[-1].rpartition("-")[0]
    raise ClusterError(
        f"the server gives no log of {task.name} ({failure}); with access to the cluster: "
        f"kubectl logs{where} -l {RUN_LABEL}={workflow},{STAGE_LABEL}={task.name} -c main",
        status=404,
    )


def _argo_pod_names(node: str) -> list[str]:
    """The pod of an Argo node: its id with a template's name before the last part."""
    workflow, _, number = node.rpartition("-")
    return [f"{workflow}-{template}-{number}" for template in POD_TEMPLATES]


def cancel(client: kfp.Client, run_id: str) -> RunState:
    """Ask the server to stop a run; one that has ended is left alone.

    Returns:
        The state before.

    Raises:
        ClusterError: There is no such run, or the server did not do it.
    """
    state = state_of(client, run_id)
    if not state.has_ended:
        client.terminate_run(run_id)
    return state
