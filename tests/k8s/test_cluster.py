"""cluster: the real client against an API server on loopback."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dinov2_core.errors import ClusterRefused, ClusterUnavailable
from k8s.cluster import AlreadyExists, Cluster
from tests.golden.manifests import manifests, read
from tests.k8s.api_server import ApiServer, api_server

NAME = "vitl14-62dce6e9-pretrain"


@pytest.fixture
def server() -> Iterator[ApiServer]:
    with api_server() as server:
        yield server


@pytest.mark.parametrize("name", sorted(manifests()))
def test_every_golden_manifest_is_taken_in_strict_mode(server: ApiServer, name: str) -> None:
    manifest = read(name)
    made = server.cluster().create(manifest)
    assert made["spec"] == manifest["spec"]
    assert server.cluster().get(manifest["metadata"]["name"]) == made


def test_an_unknown_field_is_refused_and_not_dropped(server: ApiServer) -> None:
    manifest = copy.deepcopy(read("trainjob_bare"))
    manifest["spec"]["trainer"]["numNodez"] = 2
    with pytest.raises(ClusterRefused, match=r"400: strict decoding error: .*numNodez"):
        server.cluster().create(manifest)
    assert not server.jobs


def test_a_variable_that_trainer_sets_itself_is_refused(server: ApiServer) -> None:
    manifest = copy.deepcopy(read("trainjob_bare"))
    manifest["spec"]["trainer"]["env"].append({"name": "PET_NNODES", "value": "2"})
    with pytest.raises(ClusterRefused, match="PET_NNODES is reserved"):
        server.cluster().create(manifest)


def test_a_taken_name_is_an_error_of_its_own(server: ApiServer) -> None:
    cluster = server.cluster()
    cluster.create(read("trainjob_bare"))
    with pytest.raises(AlreadyExists):
        cluster.create(read("trainjob_bare"))
    assert len(server.made("POST")) == 2


def test_what_is_not_there_is_none_and_may_be_deleted(server: ApiServer) -> None:
    cluster = server.cluster()
    assert cluster.get("absent") is None
    cluster.delete("absent")
    cluster.patch("absent", {"spec": {"suspend": True}})


def test_a_deleted_job_is_there_until_its_pods_are_gone(server: ApiServer) -> None:
    cluster = server.cluster()
    cluster.create(read("trainjob_bare"))
    cluster.delete(NAME)
    looks = [cluster.get(NAME) for _ in range(3)]
    assert [found is None for found in looks] == [False, False, True]


def test_a_patch_merges(server: ApiServer) -> None:
    cluster = server.cluster()
    made = cluster.create(read("trainjob_bare"))
    cluster.patch(NAME, {"spec": {"suspend": True}})
    found = cluster.get(NAME)
    assert found is not None
    assert found["spec"] == {**made["spec"], "suspend": True}


def test_a_missing_operator_is_not_a_missing_job(server: ApiServer) -> None:
    server.is_trainer_installed = False
    with pytest.raises(ClusterRefused, match="does not know this kind; install the operator"):
        server.cluster().get(NAME)


def test_a_missing_namespace_is_refused(server: ApiServer) -> None:
    cluster = Cluster(api=server.cluster().api, namespace="absent")
    with pytest.raises(ClusterRefused, match='"absent" not found; check placement.namespace'):
        cluster.create(read("trainjob_bare"))


@pytest.mark.parametrize("code", [429, 500, 503, 0])
def test_a_busy_server_is_asked_again(server: ApiServer, code: int) -> None:
    server.faults.extend([(code, {}), (code, {})])
    assert server.cluster().create(read("trainjob_bare"))["kind"] == "TrainJob"
    assert server.made("FAULT") == server.made("POST") * 2


def test_the_pause_that_a_server_asks_for_is_kept(server: ApiServer) -> None:
    server.faults.append((429, {"Retry-After": "1"}))
    started = time.monotonic()
    assert server.cluster().get(NAME) is None
    assert time.monotonic() - started >= 1


def test_a_server_that_stays_away_is_given_up(server: ApiServer) -> None:
    server.faults.extend([(500, {})] * 5)
    with pytest.raises(ClusterUnavailable, match=r"cannot get trainjobs .* \(500: not now\)"):
        server.cluster().get(NAME)
    assert len(server.made("FAULT")) == 5


def test_silence_has_an_end(server: ApiServer) -> None:
    server.silent_seconds = 0.3
    with pytest.raises(ClusterUnavailable, match="ReadTimeoutError"):
        server.cluster(timeout_seconds=0.05).get(NAME)


def test_a_wrong_token_and_a_missing_right_are_refused_at_once(server: ApiServer) -> None:
    with pytest.raises(ClusterRefused, match="in namespace team: Unauthorized; give the step's"):
        server.cluster(token="old").get(NAME)
    server.forbidden.add("POST")
    with pytest.raises(ClusterRefused, match=r"cannot POST resource .*; give the step's"):
        server.cluster().create(read("trainjob_bare"))
    assert len(server.made("POST")) == 1


def pod(name: str, *, created: str = "2026-01-01T00:00:00Z", **status: object) -> dict[str, object]:
    metadata = {"name": name, "labels": {"job": "j"}, "creationTimestamp": created}
    return {"metadata": metadata, "status": status}


def test_pods_say_why_they_do_not_run(server: ApiServer) -> None:
    waiting = {"state": {"waiting": {"reason": "ImagePullBackOff", "message": "no such image"}}}
    starting = {"state": {"waiting": {"reason": "ContainerCreating"}}}
    ended = {"state": {"terminated": {"exitCode": 137, "reason": "OOMKilled"}}}
    unplaced = {
        "type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/3 nodes"
    }  # fmt: skip
    server.pods += [
        pod("old", created="2025-01-01T00:00:00Z", containerStatuses=[waiting]),
        pod("new", containerStatuses=[starting]),
        pod("ended", containerStatuses=[ended]),
        pod("unplaced", conditions=[unplaced]),
        pod("evicted", phase="Failed", reason="Evicted"),
    ]
    found = server.cluster().pods("job", "j")
    assert found[-1].name == "old"
    assert {item.name: item.problem for item in found} == {
        "old": "ImagePullBackOff: no such image",
        "new": "",
        "ended": "ended with code 137 (OOMKilled)",
        "unplaced": "Unschedulable: 0/3 nodes",
        "evicted": "Evicted",
    }
    assert server.cluster().pods("job", "other") == []


def test_a_log_has_its_last_lines_and_is_empty_before_the_start(server: ApiServer) -> None:
    cluster = server.cluster()
    assert cluster.log_lines("p", container="node", last=2) == []
    server.logs["p"] = ["1 a", "2 b", "3 c"]
    assert cluster.log_lines("p", container="node", last=2) == ["2 b", "3 c"]


def test_a_log_that_must_not_be_read_is_refused(server: ApiServer) -> None:
    server.logs["p"] = ["1 a"]
    server.forbidden.add("pods/log")
    with pytest.raises(
        ClusterRefused, match="cannot read the log of p .* launcher's Role"
    ) as refused:
        server.cluster().log_lines("p", container="node", last=2)
    assert refused.value.status == 403


def test_events_of_several_objects_are_in_order(server: ApiServer) -> None:
    server.events += [
        {"involvedObject": {"name": name}, "reason": reason, "lastTimestamp": time_}
        for name, reason, time_ in (("a", "Second", "2"), ("b", "First", "1"), ("c", "No", "0"))
    ]
    assert server.cluster().events(["a", "b"]) == ["b: First: ", "a: Second: "]


def test_without_pod_and_kubeconfig_there_is_no_cluster(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(
        "kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(tmp_path / "no")
    )
    with pytest.raises(ClusterRefused, match="no cluster .*; run this in a pod"):
        Cluster.connected("team")


def test_a_kubeconfig_leads_to_its_server(
    server: ApiServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = server.write_kubeconfig(tmp_path / "config")
    monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(file))
    assert Cluster.connected("team").get(NAME) is None
