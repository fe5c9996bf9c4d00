"""The Kubernetes API: jobs, their pods, logs and events; the only user of its client."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

from kubernetes import client, config
from kubernetes.client.exceptions import ApiException
from tenacity import (
    RetryCallState,
    Retrying,
    retry_if_exception_type,
    stop_after_attempt,
    wait_random_exponential,
)
from urllib3.exceptions import HTTPError

from dinov2_core.errors import ClusterRefused, ClusterUnavailable
from k8s.trainjob import GROUP, PLURAL, VERSION

TIMEOUT_SECONDS = (5.0, 30.0)
"""To connect, and to wait for an answer."""
ATTEMPTS = 5
LONGEST_PAUSE_SECONDS = 30.0
TRANSIENT = (408, 409, 429, 500, 502, 503, 504)
"""Answers after which the same request may succeed; 409 where it is not about the name."""
BAD_REQUEST, CONFLICT, NOT_FOUND = 400, 409, 404


class AlreadyExists(Exception):
    """There is an object of this name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pod:
    """What a follower of a job needs of a pod."""

    name: str
    labels: dict[str, str]
    problem: str
    """Why it does not run or how it ended; empty while all is well."""
    started: str
    """When it was created, RFC 3339."""
    has_ended: bool
    """Whether its containers will not run any more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """One namespace of a cluster.

    Every request has a time limit, and is made again with growing pauses while the API server is
    busy or away.
    """

    api: client.ApiClient
    namespace: str
    first_pause_seconds: float = 1.0
    """Longest pause before the second attempt; doubles with each."""
    timeout_seconds: tuple[float, float] = TIMEOUT_SECONDS

    @classmethod
    def connected(cls, namespace: str) -> Cluster:
        """The cluster that this pod runs in, else the one that the kubeconfig names.

        Raises:
            ClusterRefused: There is neither.
        """
        settings = client.Configuration()
        try:
            try:
                config.load_incluster_config(client_configuration=settings)
            except config.ConfigException:
                config.load_kube_config(client_configuration=settings)
        except config.ConfigException as error:
            raise ClusterRefused(
                f"no cluster ({error}); run this in a pod with a service account, or set KUBECONFIG"
            ) from error
        settings.retries = False  # the client's own ignore Retry-After of a 429
        return cls(api=client.ApiClient(settings), namespace=namespace)

    def create(self, manifest: dict[str, Any]) -> dict[str, Any]:
        """Create a job; a field that the server does not know is refused, not dropped.

        Raises:
            AlreadyExists: The name is taken.
            ClusterRefused: The manifest is wrong, or this service account may not do it.
            ClusterUnavailable: No answer in good order after all attempts.
        """
        create = client.CustomObjectsApi(self.api).create_namespaced_custom_object
        return self._json(
            partial(create, *self._path, manifest, field_validation="Strict"),
            what=f"create {PLURAL} {manifest['metadata']['name']}",
        )

    def get(self, name: str) -> dict[str, Any] | None:
        """A job, or None where there is none.

        Raises:
            ClusterRefused, ClusterUnavailable: As for `create`.
        """
        get = client.CustomObjectsApi(self.api).get_namespaced_custom_object
        with suppress(_NotFound):
            return self._json(partial(get, *self._path, name), what=f"get {PLURAL} {name}")
        return None

    def patch(self, name: str, change: dict[str, Any]) -> None:
        """Merge a change into a job; nothing happens to one that is gone.

        Raises:
            ClusterRefused, ClusterUnavailable: As for `create`.
        """
        patch = client.CustomObjectsApi(self.api).patch_namespaced_custom_object
        with suppress(_NotFound):
            self._json(
                partial(patch, *self._path, name, change, field_validation="Strict"),
                what=f"patch {PLURAL} {name}",
            )

    def delete(self, name: str) -> None:
        """Ask for a job's deletion, with its pods before it; one that is gone is fine.

        Raises:
            ClusterRefused, ClusterUnavailable: As for `create`.
        """
        delete = client.CustomObjectsApi(self.api).delete_namespaced_custom_object
        with suppress(_NotFound):
            self._json(
                partial(delete, *self._path, name, propagation_policy="Foreground"),
                what=f"delete {PLURAL} {name}",
            )

    def pods(self, label: str, value: str) -> list[Pod]:
        """Pods that carry a label, newest first.

        Raises:
            ClusterRefused, ClusterUnavailable: As for `create`.
        """
        list_pods = client.CoreV1Api(self.api).list_namespaced_pod
        found = self._json(
            partial(list_pods, self.namespace, label_selector=f"{label}={value}"), what="list pods"
        )
        pods = [_pod(item) for item in found["items"]]
        return sorted(pods, key=lambda pod: pod.started, reverse=True)

    def log_lines(self, pod: str, *, container: str, last: int) -> list[str]:
        """Last lines of a container, each with its time in front; none while it has not started.

        Raises:
            ClusterRefused, ClusterUnavailable: As for `create`.
        """
        read = partial(client.CoreV1Api(self.api).read_namespaced_pod_log, pod, self.namespace)
        try:
            content = self._content(
                partial(read, container=container, tail_lines=last, timestamps=True),
                what=f"read the log of {pod}",
            )
        except _NotFound:
            return []
        except ClusterRefused as refused:
            if refused.status == BAD_REQUEST:  # the container waits
                return []
            raise
        return content.decode("utf-8", errors="replace").splitlines()

    def events(self, names: Sequence[str], *, last: int = 10) -> list[str]:
        """Last events of objects, oldest first.

        Raises:
            ClusterRefused, ClusterUnavailable: As for `create`.
        """
        list_events = partial(client.CoreV1Api(self.api).list_namespaced_event, self.namespace)
        found: list[dict[str, Any]] = []
        for name in names:
            chosen = partial(list_events, field_selector=f"involvedObject.name={name}")
            found += self._json(chosen, what="list events")["items"]
        found.sort(key=lambda item: item.get("lastTimestamp") or item.get("eventTime") or "")
        return [
            f"{item['involvedObject']['name']}: {item.get('reason', '')}: {item.get('message', '')}"
            for item in found[-last:]
        ]

    @property
    def _path(self) -> tuple[str, str, str, str]:
        """Address of TrainJobs, as the client's methods take it."""
        return GROUP, VERSION, self.namespace, PLURAL

    def _json(self, call: Callable[..., Any], *, what: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self._content(call, what=what))
        return found

    def _content(self, call: Callable[..., Any], *, what: str) -> bytes:
        """The bytes of an answer, after as many attempts as it takes."""

        def once() -> bytes:
            try:
                answer = call(_preload_content=False, _request_timeout=self.timeout_seconds)
                content: bytes = answer.data
                return content
            except ApiException as error:
                raise _refusal(error, what=what, namespace=self.namespace) from error
            except HTTPError as error:  # no connection, cut off, or no answer in time
                raise _unavailable(what, type(error).__name__) from error

        backoff = wait_random_exponential(
            multiplier=self.first_pause_seconds, max=LONGEST_PAUSE_SECONDS
        )
        attempts = Retrying(
            retry=retry_if_exception_type(ClusterUnavailable),
            stop=stop_after_attempt(ATTEMPTS),
            wait=lambda state: max(backoff(state), _retry_after(state)),
            reraise=True,
        )
        return attempts(once)


class _NotFound(Exception):
    """There is no such object."""


def _unavailable(what: str, reason: str) -> ClusterUnavailable:
    return ClusterUnavailable(f"cannot {what}: the API server does not answer ({reason})")


def _refusal(error: ApiException, *, what: str, namespace: str) -> Exception:
    """An answer that is no success as one of our errors."""
    body = _status_object(error)
    message = body.get("message") or error.reason or "no reason given"
    status = error.status or 0
    advice = f"the API server answers {status}: {message}"
    if status == NOT_FOUND:
        details = body.get("details") or {}
        if details.get("kind") == "namespaces":
            advice = f"{message}; check placement.namespace"
        elif details.get("name"):
            return _NotFound()
        else:
            advice = (
                "the API server does not know this kind; install the operator that runs it "
                "(Kubeflow Trainer for TrainJob), or choose another placement.launcher"
            )
    elif status == CONFLICT and body.get("reason") == "AlreadyExists":
        return AlreadyExists()
    elif status in (401, 403):
        return ClusterRefused(
            f"cannot {what} in namespace {namespace}: {message}; give the step's service account "
            "the launcher's Role, and check placement.namespace",
            status=status,
        )
    elif status in TRANSIENT:
        return _unavailable(what, f"{status}: {message}")
    return ClusterRefused(f"cannot {what}: {advice}", status=status)


def _status_object(error: ApiException) -> dict[str, Any]:
    """The Status object of an answer; empty where a proxy answered something else."""
    try:
        body = json.loads(error.body or "{}")
    except ValueError:
        return {}
    return body if isinstance(body, dict) else {}


def _retry_after(state: RetryCallState) -> float:
    """Seconds of the server's Retry-After."""
    error = state.outcome.exception() if state.outcome is not None else None
    headers = getattr(error.__cause__, "headers", None) if error is not None else None
    asked = (headers or {}).get("Retry-After", "0")
    return float(asked) if asked.isdigit() else 0.0


def _pod(item: dict[str, Any]) -> Pod:
    metadata, status = item["metadata"], item.get("status", {})
    return Pod(
        name=metadata["name"],
        labels=metadata.get("labels", {}),
        problem=_problem(status),
        started=metadata.get("creationTimestamp", ""),
        has_ended=status.get("phase") in ("Succeeded", "Failed"),
    )


def _problem(status: dict[str, Any]) -> str:
    """Why a pod is not running."""
    for container in status.get("containerStatuses") or []:
        state = container.get("state", {})
        if "waiting" in state and state["waiting"].get("reason") != "ContainerCreating":
            return _reason_and_message(state["waiting"])
        if "terminated" in state and state["terminated"].get("exitCode"):
            ended = state["terminated"]
            return f"ended with code {ended['exitCode']} ({ended.get('reason', 'Error')})"
    for condition in status.get("conditions") or []:
        if condition["type"] == "PodScheduled" and condition["status"] == "False":
            return _reason_and_message(condition)
    return status.get("reason", "") if status.get("phase") == "Failed" else ""


def _reason_and_message(state: dict[str, Any]) -> str:
    return ": ".join(part for part in (state.get("reason"), state.get("message")) if part)
