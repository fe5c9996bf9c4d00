"""deployed: objects of any kind, looked up on an API server on loopback."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from dinov2_core.errors import ClusterRefused
from k8s.deployed import CannotTell, Deployed
from k8s.trainjob import TRAIN_JOBS
from tests.golden.manifests import read
from tests.k8s.api_server import ApiServer, api_server
from tests.k8s.shipped import Manifest


@pytest.fixture
def server() -> Iterator[ApiServer]:
    with api_server() as server:
        yield server


def manifest(version: str, kind: str, name: str, namespace: str | None = None) -> Manifest:
    metadata = {"name": name} | ({"namespace": namespace} if namespace else {})
    return {"apiVersion": version, "kind": kind, "metadata": metadata}


def test_objects_are_found_by_kind_namespace_and_name(server: ApiServer) -> None:
    server.objects += [
        manifest("v1", "Namespace", "team"),
        manifest("v1", "ConfigMap", "mlflow", "team"),
        manifest("v1", "ConfigMap", "mlflow", "other"),
        manifest("apps/v1", "Deployment", "mlflow", "team"),
        manifest("kueue.x-k8s.io/v1beta2", "ClusterQueue", "mlflow"),
    ]
    deployed = Deployed(server.cluster())
    for item in server.objects:
        assert deployed.find(item) == item
    assert deployed.find(manifest("v1", "ConfigMap", "mlflow")) == server.objects[1]
    assert deployed.find(manifest("v1", "Namespace", "other")) is None
    assert deployed.find(manifest("apps/v1", "Deployment", "other", "team")) is None
    assert server.made("GET").count("/api/v1") == 1


def test_a_kind_that_is_not_installed_is_not_deployed(server: ApiServer) -> None:
    deployed = Deployed(server.cluster())
    assert deployed.find(manifest("example.com/v1", "Thing", "a", "team")) is None
    assert deployed.find(manifest("v1", "Thing", "a", "team")) is None


def test_a_missing_right_is_told_apart_from_a_missing_object(server: ApiServer) -> None:
    server.forbidden.add("configmaps")
    deployed = Deployed(server.cluster())
    with pytest.raises(CannotTell, match="forbidden to get /api/v1/namespaces/team/configmaps/a"):
        deployed.find(manifest("v1", "ConfigMap", "a", "team"))
    assert deployed.find(manifest("v1", "Service", "a", "team")) is None


def test_an_account_that_is_refused_altogether_is_an_error(server: ApiServer) -> None:
    deployed = Deployed(server.cluster(token="old"))
    with pytest.raises(ClusterRefused, match="Unauthorized"):
        deployed.find(manifest("v1", "ConfigMap", "a", "team"))


def test_jobs_are_those_with_all_labels_newest_first(server: ApiServer) -> None:
    for name, created, stage in (
        ("a", "1", "p"),
        ("c", "3", "p"),
        ("b", "2", "p"),
        ("d", "4", "q"),
    ):
        job = read("trainjob_bare")
        labels = {"stage": stage, "part-of": "us"}
        job["metadata"] = {
            "name": name, "namespace": "team", "creationTimestamp": created, "labels": labels
        }  # fmt: skip
        server.jobs[name] = job
    found = Deployed(server.cluster()).jobs(TRAIN_JOBS, labels={"stage": "p", "part-of": "us"})
    assert [job["metadata"]["name"] for job in found] == ["c", "b", "a"]
    assert Deployed(server.cluster()).jobs(TRAIN_JOBS, labels={"stage": "x"}) == []
