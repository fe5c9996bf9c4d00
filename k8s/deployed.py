"""Looks objects of any kind up on a cluster, by their manifests."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from dinov2_core.errors import ClusterRefused
from k8s.cluster import Cluster
from k8s.job_kind import JobKind

FORBIDDEN = 403

Object = dict[str, Any]


class CannotTell(Exception):
    """Whether an object is there is not known; the message says why."""


@dataclass(frozen=True, slots=True)
class Deployed:
    """What a cluster has."""

    cluster: Cluster
    _kinds: dict[str, dict[str, Object]] = field(default_factory=dict)
    """Kinds that were asked for, by group and version."""

    def find(self, manifest: Object) -> Object | None:
        """The object of a manifest's kind and name; None where there is none, nor such a kind.

        Args:
            manifest: Without a namespace, a namespaced object is looked for in the cluster's.

        Raises:
            CannotTell: This account may not look.
            ClusterRefused: The API server does not take this account at all.
            ClusterUnreachable: It does not answer.
        """
        group = _address(manifest["apiVersion"])
        kind = self._kinds_of(group).get(manifest["kind"])
        if kind is None:
            return None
        metadata = manifest["metadata"]
        namespace = metadata.get("namespace", self.cluster.namespace)
        place = f"namespaces/{namespace}/" if kind["namespaced"] else ""
        return self._look(f"{group}/{place}{kind['name']}/{metadata['name']}")

    def jobs(self, kind: JobKind, *, labels: dict[str, str]) -> list[Object]:
        """Jobs of the cluster's namespace that carry all the labels, newest first.

        Raises:
            CannotTell, ClusterRefused, ClusterUnreachable: As for `find`.
        """
        path = f"{_address(kind.api_version)}/namespaces/{self.cluster.namespace}/{kind.plural}"
        found = self._look(path, labels=labels) or {"items": []}
        return sorted(
            found["items"],
            key=lambda job: str(job["metadata"].get("creationTimestamp", "")),
            reverse=True,
        )

    def _kinds_of(self, group: str) -> dict[str, Object]:
        """A group's kinds by name; none where the group is not installed."""
        if group not in self._kinds:
            found = self._look(group) or {"resources": []}
            self._kinds[group] = {
                item["kind"]: item for item in found["resources"] if "/" not in item["name"]
            }
        return self._kinds[group]

    def _look(self, path: str, *, labels: dict[str, str] | None = None) -> Object | None:
        try:
            return self.cluster.fetch(path, labels=labels)
        except ClusterRefused as refused:
            if refused.status != FORBIDDEN:
                raise
            raise CannotTell(f"forbidden to get {path}") from refused


def _address(api_version: str) -> str:
    """Where the API serves the kinds of a version, such as `v1` or `apps/v1`."""
    return f"/apis/{api_version}" if "/" in api_version else f"/api/{api_version}"
