"""The Kubernetes API: jobs, their pods, logs and events; the only door to its client."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from kubernetes import client, config
from kubernetes.client.exceptions import ApiException
from urllib3.exceptions import HTTPError

from k8s.job_kind import JobKind

logger = logging.getLogger(__name__)

TIMEOUT_SECONDS = (5.0, 30.0)
"""To connect, and to wait for an answer."""
ATTEMPTS = 5
LONGEST_PAUSE_SECONDS = 30.0
AGAIN = (408, 409, 429, 500, 502, 503, 504)
"""Answers after which the same request may succeed; 409 where it is not about the name."""
NOT_FOUND = 404


class ClusterUnreachable(Exception):
    """The API server does not answer, or not in good order; it may later."""


class ClusterRefused(ValueError):
    """The API server refuses a request; the message says what to change.

    Args:
        message: For a person.
        status: Code of the answer; 0 where there was none.
    """

    def __init__(self, message: str, *, status: int = 0) -> None:
        super().__init__(message)
        self.status = status


class AlreadyExists(Exception):
    """There is an object of this name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pod:
    """A pod as far as its follower looks at it."""

    name: str
    labels: dict[str, str]
    trouble: str
    """Why it does not run or how it ended, in words; empty while all is well."""
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
    """Before the second attempt; doubles with each."""
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
                f"no cluster to talk to ({error}); run this in a pod with a service account, or "
                "set KUBECONFIG"
            ) from error
        settings.retries = False  # the client's own would hide the pauses that a server asks for
        return cls(api=client.ApiClient(settings), namespace=namespace)

    def create(self, kind: JobKind, manifest: dict[str, Any]) -> dict[str, Any]:
        """Create a job; a field that the server does not know is refused, not dropped.

        Raises:
            AlreadyExists: The name is taken.
            ClusterRefused: The manifest is wrong, or this service account may not do it.
            ClusterUnreachable: No answer in good order after all attempts.
        """
        custom = client.CustomObjectsApi(self.api)
        path = (kind.group, kind.version, self.namespace, kind.plural)
        return self._json(
            lambda **options: custom.create_namespaced_custom_object(
                *path, manifest, field_validation="Strict", **options
            ),
            what=f"create {kind.plural} {manifest['metadata']['name']}",
        )

    def get(self, kind: JobKind, name: str) -> dict[str, Any] | None:
        """A job, or None where there is none.

        Raises:
            ClusterRefused, ClusterUnreachable: As for `create`.
        """
        custom = client.CustomObjectsApi(self.api)
        path = (kind.group, kind.version, self.namespace, kind.plural, name)
        try:
            return self._json(
                lambda **options: custom.get_namespaced_custom_object(*path, **options),
                what=f"get {kind.plural} {name}",
            )
        except _NotFound:
            return None

    def patch(self, kind: JobKind, name: str, change: dict[str, Any]) -> None:
        """Merge a change into a job; a job that is gone stays gone.

        Raises:
            ClusterRefused, ClusterUnreachable: As for `create`.
        """
        custom = client.CustomObjectsApi(self.api)
        path = (kind.group, kind.version, self.namespace, kind.plural, name)
        try:
            self._json(
                lambda **options: custom.patch_namespaced_custom_object(
                    *path, change, field_validation="Strict", **options
                ),
                what=f"patch {kind.plural} {name}",
            )
        except _NotFound:
            logger.info("%s %s is gone", kind.plural, name)

    def delete(self, kind: JobKind, name: str) -> None:
        """Ask for a job's deletion, with its pods before it; one that is gone is fine.

        Raises:
            ClusterRefused, ClusterUnreachable: As for `create`.
        """
        custom = client.CustomObjectsApi(self.api)
        path = (kind.group, kind.version, self.namespace, kind.plural, name)
        try:
            self._json(
                lambda **options: custom.delete_namespaced_custom_object(
                    *path, propagation_policy="Foreground", **options
                ),
                what=f"delete {kind.plural} {name}",
            )
        except _NotFound:
            logger.info("%s %s is gone already", kind.plural, name)

    def pods(self, label: str, value: str) -> list[Pod]:
        """Pods that carry a label, newest first.

        Raises:
            ClusterRefused, ClusterUnreachable: As for `create`.
        """
        core = client.CoreV1Api(self.api)
        found = self._json(
            lambda **options: core.list_namespaced_pod(
                self.namespace, label_selector=f"{label}={value}", **options
            ),
            what="list pods",
        )
        pods = [_pod(item) for item in found["items"]]
        return sorted(pods, key=lambda pod: pod.started, reverse=True)

    def log_lines(self, pod: str, *, container: str, last: int) -> list[str]:
        """Last lines of a container, each with its time in front; none while it has not started.

        Raises:
            ClusterUnreachable: As for `create`.
        """
        core = client.CoreV1Api(self.api)
        try:
            content = self._content(
                lambda **options: core.read_namespaced_pod_log(
                    pod,
                    self.namespace,
                    container=container,
                    tail_lines=last,
                    timestamps=True,
                    **options,
                ),
                what=f"read the log of {pod}",
            )
        except (_NotFound, ClusterRefused):  # a container that waits has no log: 400
            return []
        return content.decode("utf-8", errors="replace").splitlines()

    def events(self, names: Sequence[str], *, last: int = 10) -> list[str]:
        """What the cluster noted about objects, oldest first.

        Raises:
            ClusterRefused, ClusterUnreachable: As for `create`.
        """
        core = client.CoreV1Api(self.api)
        found: list[dict[str, Any]] = []
        for name in names:
            chosen = f"involvedObject.name={name}"
            found += self._json(
                lambda chosen=chosen, **options: core.list_namespaced_event(
                    self.namespace, field_selector=chosen, **options
                ),
                what="list events",
            )["items"]
        found.sort(key=lambda item: item.get("lastTimestamp") or item.get("eventTime") or "")
        return [
            f"{item['involvedObject']['name']}: {item.get('reason', '')}: {item.get('message', '')}"
            for item in found[-last:]
        ]

    def _json(self, call: Callable[..., Any], *, what: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self._content(call, what=what))
        return found

    def _content(self, call: Callable[..., Any], *, what: str) -> bytes:
        """The bytes of an answer, after as many attempts as it takes."""
        pause, told = self.first_pause_seconds, ""
        for attempt in range(ATTEMPTS):
            if attempt:
                time.sleep(min(pause, LONGEST_PAUSE_SECONDS))
                pause *= 2
            try:
                answer = call(_preload_content=False, _request_timeout=self.timeout_seconds)
                content: bytes = answer.data
                return content
            except ApiException as error:
                told = _refusal(error, what=what, namespace=self.namespace)
                pause = max(pause, _asked_pause(error))
            except HTTPError as error:  # no connection, cut off, or no answer in time
                told = type(error).__name__
            logger.debug("cannot %s: %s", what, told)
        raise ClusterUnreachable(f"cannot {what}: the API server does not answer ({told})")


class _NotFound(Exception):
    """There is no such object."""


def _refusal(error: ApiException, *, what: str, namespace: str) -> str:
    """What the server said, where trying again may help; raises where it does not."""
    said = _said(error)
    message = said.get("message") or error.reason or "no reason given"
    status = error.status or 0
    if status == NOT_FOUND:
        details = said.get("details") or {}
        if details.get("kind") == "namespaces":
            raise ClusterRefused(
                f"cannot {what}: {message}; check placement.namespace", status=status
            )
        if details.get("name"):
            raise _NotFound
        raise ClusterRefused(
            f"cannot {what}: the API server does not know this kind; install the operator that "
            "runs it (Kubeflow Trainer for TrainJob), or choose another placement.launcher",
            status=status,
        )
    if status == 409 and said.get("reason") == "AlreadyExists":
        raise AlreadyExists
    if status in (401, 403):
        raise ClusterRefused(
            f"cannot {what} in namespace {namespace}: {message}; give the step's service account "
            "the launcher's Role, and check placement.namespace",
            status=status,
        )
    if status not in AGAIN:
        raise ClusterRefused(
            f"cannot {what}: the API server answers {status}: {message}", status=status
        )
    return f"{status}: {message}"


def _said(error: ApiException) -> dict[str, Any]:
    """The Status object of an answer; empty where a proxy answered something else."""
    try:
        said = json.loads(error.body or "{}")
    except ValueError:
        return {}
    return said if isinstance(said, dict) else {}


def _asked_pause(error: ApiException) -> float:
    """Seconds that the server asks to wait."""
    asked = (error.headers or {}).get("Retry-After", "0")
    return float(asked) if asked.isdigit() else 0.0


def _pod(item: dict[str, Any]) -> Pod:
    metadata, status = item["metadata"], item.get("status", {})
    return Pod(
        name=metadata["name"],
        labels=metadata.get("labels", {}),
        trouble=_trouble(status),
        started=metadata.get("creationTimestamp", ""),
        has_ended=status.get("phase") in ("Succeeded", "Failed"),
    )


def _trouble(status: dict[str, Any]) -> str:
    """Why a pod is not running, in words."""
    for container in status.get("containerStatuses") or []:
        state = container.get("state", {})
        if "waiting" in state and state["waiting"].get("reason") != "ContainerCreating":
            return _words(state["waiting"])
        if "terminated" in state and state["terminated"].get("exitCode"):
            ended = state["terminated"]
            return f"ended with code {ended['exitCode']} ({ended.get('reason', 'Error')})"
    for condition in status.get("conditions") or []:
        if condition["type"] == "PodScheduled" and condition["status"] == "False":
            return _words(condition)
    return status.get("reason", "") if status.get("phase") == "Failed" else ""


def _words(state: dict[str, Any]) -> str:
    return ": ".join(part for part in (state.get("reason"), state.get("message")) if part)
