"""difference: what is told of an object that an API server gives back."""

from __future__ import annotations

from typing import Any

import pytest

from k8s.difference import difference, without_secrets
from tests.golden.manifests import manifests
from tests.k8s.shipped import Manifest, applied, changed

DEPLOYMENT: Manifest = {
    "apiVersion": "apps/v1",
    "kind": "Deployment",
    "metadata": {"name": "mlflow", "namespace": "team", "labels": {"app": "mlflow"}},
    "spec": {
        "replicas": 2,
        "template": {
            "spec": {
                "containers": [
                    {
                        "name": "mlflow",
                        "image": "registry.example/mlflow@sha256:aa",
                        "env": [{"name": "A", "value": "1"}, {"name": "B", "value": "2"}],
                        "ports": [{"containerPort": 5000}],
                        "resources": {"requests": {"cpu": "1", "memory": "2Gi"}},
                    }
                ],
                "volumes": [{"name": "scratch", "emptyDir": {}}],
                "nodeSelector": {"pool": "cpu"},
            }
        },
    },
}
CONTAINER = "spec.template.spec.containers.0"


def signs(lines: list[str]) -> list[str]:
    """Removed and added lines without their place."""
    return [f"{line[0]}{line[1:].strip()}" for line in lines[2:] if line[0] in "+-"]


@pytest.mark.parametrize(
    "manifest", [DEPLOYMENT, *manifests().values()], ids=["Deployment", *manifests()]
)
def test_what_was_applied_is_as_planned(manifest: Manifest) -> None:
    assert difference(manifest, applied(manifest)) == []


def test_defaults_and_what_controllers_add_do_not_count() -> None:
    live = applied(DEPLOYMENT)
    live["spec"] |= {"progressDeadlineSeconds": 600, "strategy": {"type": "RollingUpdate"}}
    (container,) = live["spec"]["template"]["spec"]["containers"]
    container["terminationMessagePath"] = "/dev/termination-log"
    container["ports"][0]["protocol"] = "TCP"
    live["metadata"]["labels"]["added"] = "by-somebody"
    del live["spec"]["template"]["spec"]["volumes"][0]["emptyDir"]
    assert difference(DEPLOYMENT, live) == []


@pytest.mark.parametrize(
    ("path", "value", "told"),
    [
        ("spec.replicas", 3, ["-replicas: 3", "+replicas: 2"]),
        (f"{CONTAINER}.image", "old", ["-image: old", "+image: registry.example/mlflow@sha256:aa"]),
        (f"{CONTAINER}.env.0.value", "0", ["-value: '0'", "+value: '1'"]),
        (f"{CONTAINER}.env.0", ..., ["+- name: A", "+value: '1'"]),
        (f"{CONTAINER}.resources.requests.cpu", "2", ["-cpu: '2'", "+cpu: '1'"]),
        ("metadata.labels.app", ..., ["+labels:", "+app: mlflow"]),
    ],
)
def test_a_changed_field_is_told_and_nothing_else(path: str, value: Any, told: list[str]) -> None:
    live = changed(applied(DEPLOYMENT), path, value)
    found = signs(difference(DEPLOYMENT, live))
    assert [line for line in found if line not in ("-labels: {}",)] == told


def test_equal_amounts_and_another_order_are_no_difference() -> None:
    live = changed(
        applied(DEPLOYMENT), f"{CONTAINER}.resources.requests", {"cpu": "1000m", "memory": "2048Mi"}
    )
    live["spec"]["template"]["spec"]["containers"][0]["env"].reverse()
    assert difference(DEPLOYMENT, live) == []


def test_equal_amounts_elsewhere_are_different_texts() -> None:
    wanted = changed(DEPLOYMENT, "metadata.labels.version", "1.1")
    live = changed(applied(wanted), "metadata.labels.version", "1.10")
    assert signs(difference(wanted, live)) == ["-version: '1.10'", "+version: '1.1'"]


def test_what_was_ours_and_is_no_longer_rendered_would_go() -> None:
    live = applied(DEPLOYMENT)
    live["spec"]["template"]["spec"]["nodeSelector"]["zone"] = "a"  # somebody else's
    wanted = changed(DEPLOYMENT, "spec.template.spec.nodeSelector", ...)
    wanted = changed(wanted, f"{CONTAINER}.env.1", ...)
    assert signs(difference(wanted, live)) == [
        "-- name: B", "-value: '2'", "-nodeSelector:", "-pool: cpu",
    ]  # fmt: skip
    partly = difference(wanted, live, is_whole=False)
    assert signs(partly) == ["-- name: B"]


def test_items_that_only_the_cluster_has_are_told_by_name_and_other_managers_are_left_alone() -> (
    None
):
    live = applied(DEPLOYMENT)
    live["spec"]["template"]["spec"]["containers"][0]["env"].append(
        {"name": "TOKEN", "value": "hush-hush"}
    )
    assert signs(difference(DEPLOYMENT, live)) == ["-- name: TOKEN"]
    job = manifests()["trainjob_full"]
    live = applied(job)
    live["spec"]["runtimePatches"].append({"manager": "kueue.x-k8s.io/manager"})
    assert difference(job, live) == []


def test_a_secret_shows_its_keys_only() -> None:
    wanted = {
        "apiVersion": "v1", "kind": "Secret", "metadata": {"name": "store"},
        "stringData": {"password": "hush-new", "user": "hush-user"},
    }  # fmt: skip
    live = applied({**wanted, "stringData": {"password": "hush-old", "token": "hush-token"}})
    live["data"] = {"password": "aHVzaC1vbGQ=", "token": "aHVzaC10b2tlbg=="}
    lines = difference(wanted, live)
    assert signs(lines) == ["-token: (not shown)", "+user: (not shown)"]
    assert not {"hush", "aHVzaC"}.intersection(str([lines, without_secrets(live)["data"]]))
    assert "hush" not in str(lines)


def test_lines_are_a_unified_diff_with_names() -> None:
    lines = difference(DEPLOYMENT, changed(applied(DEPLOYMENT), "spec.replicas", 1))
    assert lines[:2] == ["--- deployed/Deployment/mlflow", "+++ planned/Deployment/mlflow"]
    assert lines[2].startswith("@@ ")
