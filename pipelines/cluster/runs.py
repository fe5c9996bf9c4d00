"""A run on a cluster: its state, waiting for its end, logs, cancelling."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import kfp

from dinov2_core.errors import InputError, PipelinesRefused, PipelinesUnavailable
from k8s.training import STAGE_LABEL
from pipelines.cluster.client import NoAnswer, address_of, fetch_text, with_retries
from pipelines.spec.pipeline_spec import STAGES

NOT_FOUND = 404
SUCCEEDED = "SUCCEEDED"
RUN_LABEL = "workflows.argoproj.io/workflow"
"""Argo's label of a run's pods."""
ENDED = (SUCCEEDED, "FAILED", "CANCELED", "SKIPPED", "ERROR")
"""Final states."""
POD_TEMPLATES = tuple(
    f"{metadata}{retried}system-container-impl"
    for metadata in ("metadata-0-2-", "metadata-0-3-", "metadata-0-4-", "")
    for retried in ("retry-", "")
)
"""Argo's names of the template that runs a task's container: they depend on how many annotations
and labels its pod has, and on whether it may be retried."""
LOG_RIGHTS = (
    "reading the log of a stage needs the verbs get on pods/log and readLog on runs of API group "
    "pipelines.kubeflow.org, which the Role in k8s/base/submitter.yaml has"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One stage of a run."""

    name: str
    state: str
    seconds: float | None
    """From start to end, or until now; None before the start."""
    reason: str
    """The server's message about its failure."""
    pods: tuple[str, ...]
    """Argo's nodes of its container, the last attempt last."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunState:
    """A run as the server reports it."""

    run_id: str
    name: str
    state: str
    reason: str
    """The server's message about its failure."""
    address: str
    tasks: tuple[Task, ...]
    """Stages that have started, in the pipeline's order."""

    @property
    def has_ended(self) -> bool:
        """Whether its state is final: succeeded, failed, canceled or skipped."""
        return self.state in ENDED

    @property
    def failed_task(self) -> Task | None:
        """The first stage that failed."""
        return next((task for task in self.tasks if task.state in ("FAILED", "ERROR")), None)


def state_of(client: kfp.Client, run_id: str) -> RunState:
    """The state of a run.

    Raises:
        PipelinesRefused: There is no such run, or this account may not see it.
        PipelinesUnavailable: The server fails or does not answer.
    """
    with_retries(client)
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
    nested = _with_descendants(item, nodes)
    pods = [node for node in nested if node.pod_name and not _children(node, nodes)]
    pods = [node for node in pods if not node.display_name.endswith("-driver")]
    pods.sort(key=lambda node: (node.start_time is not None, str(node.start_time)))
    reasons = [_reason(node) for node in (item, *nested)]
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


def _with_descendants(item: Any, nodes: Mapping[str, Any]) -> list[Any]:
    """A task and the nodes that belong to it, without the stages that merely follow it."""
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
class PollingPolicy:
    """Pauses and limits of waiting for a run."""

    first_seconds: float = 2.0
    """Pause after a change."""
    longest_seconds: float = 30.0
    """Pauses grow up to this while nothing changes."""
    outage_seconds: float = 900.0
    """Longest time without a good answer of the server."""
    timeout_seconds: float | None = None
    """Longest time to wait; None has no limit."""


def wait(
    client: kfp.Client,
    run_id: str,
    *,
    policy: PollingPolicy | None = None,
    on_change: Callable[[RunState], None] = lambda _: None,
) -> RunState:
    """Wait until a run has ended, however it ends.

    Args:
        client: Any client.
        run_id: The run.
        policy: None for the defaults.
        on_change: Called with each new state of the run or of a stage.

    Raises:
        PipelinesRefused: The run is unknown, or this account may not see it.
        PipelinesUnavailable: The server failed or did not answer for too long.
        TimeoutError: The time-out passed; the run goes on.
    """
    policy = policy or PollingPolicy()
    began = answered = time.monotonic()
    pause, reported = policy.first_seconds, None
    while True:
        try:
            state = state_of(client, run_id)
        except PipelinesUnavailable:
            if time.monotonic() - answered > policy.outage_seconds:
                raise
        else:
            answered = time.monotonic()
            current = (state.state, [(task.name, task.state) for task in state.tasks])
            if current != reported:
                on_change(state)
                pause, reported = policy.first_seconds, current
            if state.has_ended:
                return state
        timeout = policy.timeout_seconds
        if timeout is not None and time.monotonic() - began > timeout:
            raise TimeoutError(
                f"run {run_id} has not ended within {timeout:g} seconds and goes on; "
                f"dinopipe wait {run_id} takes up waiting again"
            )
        time.sleep(pause)
        pause = min(pause * 1.5, policy.longest_seconds)


def logs(client: kfp.Client, task: Task, *, run_id: str, namespace: str = "") -> str:
    """The log of the last attempt of a stage.

    Args:
        client: Any client.
        task: Stage of `state_of`.
        run_id: Its run.
        namespace: Of its pods; empty leaves it to the server.

    Raises:
        InputError: The stage has no pod yet.
        PipelinesRefused: The server has no log of it, or this account may not read it.
        PipelinesUnavailable: The server does not answer.
    """
    if not task.pods:
        raise InputError(f"{task.name} has no pod yet, so it has written nothing")
    failures: list[PipelinesRefused | PipelinesUnavailable] = []
    for pod in (task.pods[-1], *_argo_pod_names(task.pods[-1])):
        query = {"podname": pod, "runid": run_id}
        query |= {"podnamespace": namespace} if namespace else {}
        # The API server's own address has the first, that of the user interface the second.
        for path, parameters in (
            (f"/apis/v1alpha1/runs/{run_id}/nodes/{pod}/log", {}),
            ("/k8s/pod/logs", query),
        ):
            try:
                return _log_text(client, path, parameters)
            except NoAnswer:
                raise
            except (PipelinesRefused, PipelinesUnavailable) as error:
                failures.append(error)
                if _status(error) in (401, 403):
                    message = f"{error}; {LOG_RIGHTS}"
                    raise PipelinesRefused(message, status=_status(error)) from error
    reason = min(failures, key=lambda failure: _status(failure) == NOT_FOUND)
    where = f" -n {namespace}" if namespace else ""
    workflow = task.pods[-1].rpartition("-")[0]
    raise PipelinesRefused(
        f"the server gives no log of {task.name} ({reason}); with access to the cluster: "
        f"kubectl logs{where} -l {RUN_LABEL}={workflow},{STAGE_LABEL}={task.name} -c main",
        status=NOT_FOUND,
    )


def _status(error: PipelinesRefused | PipelinesUnavailable) -> int:
    return error.status if isinstance(error, PipelinesRefused) else 0


def _log_text(client: kfp.Client, path: str, query: Mapping[str, str]) -> str:
    """A log; Kubeflow answers 200 with a JSON object where it has none or may not read it."""
    text = fetch_text(client, path, query)
    if not text.startswith('{"error_message"'):
        return text
    message = str(json.loads(text)["error_message"])
    if "forbidden" in message.lower() or "PermissionDenied" in message:
        raise PipelinesRefused(message, status=403)
    raise PipelinesUnavailable(message)


def _argo_pod_names(node: str) -> list[str]:
    """Possible pods of an Argo node: its id with a template's name before the last part."""
    workflow, _, number = node.rpartition("-")
    return [f"{workflow}-{template}-{number}" for template in POD_TEMPLATES]


def cancel(client: kfp.Client, run_id: str) -> RunState:
    """Ask the server to stop a run that has not ended.

    Returns:
        The state before.

    Raises:
        PipelinesRefused, PipelinesUnavailable: As for `state_of`.
    """
    state = state_of(client, run_id)
    if not state.has_ended:
        client.terminate_run(run_id)
    return state
