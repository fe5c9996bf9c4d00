"""The manifests that we ship, built and checked as far as it can be done without a cluster."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from k8s.launchers import RUNTIME
from k8s.placement import PodPlacement
from k8s.rules import mappings, problems
from k8s.trainjob import trainjob
from tests.golden.manifests import FULL
from tests.golden.manifests import training as a_training
from tests.k8s.schemas import schema_problems
from tests.k8s.shipped import DIGEST, EXTRA_COMPONENTS, SHIPPED, Build, Manifest

OVERLAYS = ("dev-cpu", "prod-gpu", "smoke")
WHOLE = ("dev-cpu", "prod-gpu")

Installed = dict[str, list[Manifest]]


def one(manifests: list[Manifest], kind: str, name: str | None = None) -> Manifest:
    (found,) = (
        item
        for item in manifests
        if item["kind"] == kind and name in (None, item["metadata"]["name"])
    )
    return found


def test_all_overlays_are_known_here(installed: Installed) -> None:
    assert set(installed) == set(OVERLAYS)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_schemas_find_nothing(overlay: str, installed: Installed) -> None:
    found = {
        f"{item['kind']} {item['metadata']['name']}": schema_problems(item)
        for item in installed[overlay]
    }
    assert {name: wrong for name, wrong in found.items() if wrong} == {}


@pytest.mark.parametrize("overlay", WHOLE)
def test_our_rules_find_nothing(overlay: str, installed: Installed) -> None:
    assert problems(installed[overlay]) == []


@pytest.mark.parametrize("overlay", WHOLE)
def test_the_smoke_test_fits_each_overlay(overlay: str, installed: Installed) -> None:
    assert problems([*installed[overlay], *installed["smoke"]]) == []


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_an_image_that_nobody_set_is_refused(overlay: str, build: Build) -> None:
    found = [text for text in problems(build(SHIPPED / "overlays" / overlay)) if "image" in text]
    assert found
    assert all("set yours in the overlay" in text for text in found)


def test_kustomize_sets_the_image_of_a_trainjob_too(installed: Installed) -> None:
    image = one(installed["smoke"], "TrainJob")["spec"]["trainer"]["image"]
    assert image == f"registry.example.com/dinopipe@{DIGEST}"


@pytest.mark.parametrize("overlay", WHOLE)
def test_the_defaults_of_a_spec_are_installed(overlay: str, installed: Installed) -> None:
    placement = PodPlacement()
    one(installed[overlay], "TrainingRuntime", RUNTIME)
    one(installed[overlay], "ServiceAccount", placement.training_service_account)
    one(installed[overlay], "Namespace", placement.namespace)


@pytest.mark.parametrize("overlay", WHOLE)
def test_the_namespace_enforces_the_restricted_profile(overlay: str, installed: Installed) -> None:
    labels = one(installed[overlay], "Namespace")["metadata"]["labels"]
    for mode in ("enforce", "warn", "audit"):
        assert labels[f"pod-security.kubernetes.io/{mode}"] == "restricted"
        assert labels[f"pod-security.kubernetes.io/{mode}-version"] == "v1.36"


def pods_of(manifests: list[Manifest]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every whole pod; patches of a runtime are none."""
    for manifest in manifests:
        for path, found in mappings(manifest):
            if isinstance(found.get("containers"), list) and "runtimePatches" not in path:
                yield f"{manifest['kind']} {manifest['metadata']['name']}: {path}", found


def test_every_pod_passes_the_restricted_profile_and_is_limited(extended: list[Manifest]) -> None:
    """Runtimes are admitted without it, and their pods would be refused one by one."""
    pods = dict(pods_of(extended))
    assert len(pods) >= 3
    for path, pod in pods.items():
        assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.keys(), path
        assert pod["automountServiceAccountToken"] is False, path
        assert pod["securityContext"]["runAsNonRoot"] is True, path
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, path
        assert not [volume for volume in pod.get("volumes", ()) if "hostPath" in volume], path
        for container in (*pod.get("initContainers", ()), *pod["containers"]):
            name = f"{path}: {container['name']}"
            security = container["securityContext"]
            assert security.keys().isdisjoint({"privileged", "runAsUser", "runAsNonRoot"}), name
            assert security["allowPrivilegeEscalation"] is False, name
            assert security["readOnlyRootFilesystem"] is True, name
            assert security["capabilities"] == {"drop": ["ALL"]}, name
            assert not [port for port in container.get("ports", ()) if "hostPort" in port], name
            resources = container["resources"]
            assert {"cpu", "memory"} <= resources["requests"].keys(), name
            assert "memory" in resources["limits"], name


def test_no_role_of_ours_is_wide(extended: list[Manifest]) -> None:
    rules = [rule for item in extended if item["kind"] == "Role" for rule in item["rules"]]
    assert rules
    for rule in rules:
        named = {*rule["apiGroups"], *rule["resources"], *rule["verbs"]}
        assert not named & {"*", "bind", "escalate", "impersonate"}, rule
        assert "secrets" not in rule["resources"] or rule.get("resourceNames"), rule


def test_selectors_choose_pods_and_references_lead_to_objects(extended: list[Manifest]) -> None:
    """What Kubernetes takes as it is: pods would be missing or wait for ever."""
    known = {(item["kind"], item["metadata"]["name"]) for item in extended}
    labels = [
        item["spec"]["template"]["metadata"]["labels"]
        for item in extended
        if item["kind"] == "Deployment"
    ]
    for item in extended:
        if item["kind"] in ("Service", "PodDisruptionBudget"):
            selector = item["spec"]["selector"]
            wanted = selector.get("matchLabels", selector)
            assert any(wanted.items() <= found.items() for found in labels), item["metadata"]
        if item["kind"] == "RoleBinding":
            assert ("Role", item["roleRef"]["name"]) in known, item["metadata"]
    for path, pod in pods_of(extended):
        assert ("ServiceAccount", pod["serviceAccountName"]) in known, path
        for _, found in mappings(pod):
            for key, kind, name in (
                ("configMapKeyRef", "ConfigMap", "name"),
                ("configMapRef", "ConfigMap", "name"),
                ("persistentVolumeClaim", "PersistentVolumeClaim", "claimName"),
            ):
                assert key not in found or (kind, found[key][name]) in known, path


@pytest.mark.parametrize("overlay", WHOLE)
def test_everything_is_closed_before_something_is_opened(
    overlay: str, installed: Installed
) -> None:
    closed = one(installed[overlay], "NetworkPolicy", "nothing")["spec"]
    assert closed == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}


def runtime_spec(manifests: list[Manifest]) -> dict[str, Any]:
    spec: dict[str, Any] = one(manifests, "TrainingRuntime")["spec"]["template"]["spec"]
    return spec


def test_wrong_input_fails_at_once_and_a_lost_node_does_not(installed: Installed) -> None:
    spec = runtime_spec(installed["prod-gpu"])
    (rule,) = spec["failurePolicy"]["rules"]
    assert (rule["action"], rule["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])
    assert spec["failurePolicy"]["maxRestarts"] > 0
    job = spec["replicatedJobs"][0]["template"]["spec"]
    ignored, failed = job["podFailurePolicy"]["rules"]
    assert ignored["action"] == "Ignore"
    assert ignored["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
    assert (failed["action"], failed["onExitCodes"]["values"]) == ("FailJob", [64])
    assert job["backoffLimit"] == 0


def test_training_pods_of_one_version_find_each_other(installed: Installed) -> None:
    """The network policy's selector is that of the runtime's pods, which no schema sees."""
    pod = runtime_spec(installed["prod-gpu"])["replicatedJobs"][0]["template"]["spec"]["template"]
    policy = one(installed["prod-gpu"], "NetworkPolicy", "training")["spec"]
    assert policy["podSelector"]["matchLabels"].items() <= pod["metadata"]["labels"].items()
    assert {"podSelector": policy["podSelector"]} in policy["ingress"][0]["from"]


def test_the_quota_and_the_queue_hold_the_same_gpus(installed: Installed) -> None:
    hard = one(installed["prod-gpu"], "ResourceQuota")["spec"]["hard"]
    (group,) = one(installed["prod-gpu"], "ClusterQueue")["spec"]["resourceGroups"]
    quotas = {item["name"]: item["nominalQuota"] for item in group["flavors"][0]["resources"]}
    assert hard["requests.nvidia.com/gpu"] == quotas["nvidia.com/gpu"]


def test_a_training_of_ours_fits_what_is_installed(installed: Installed) -> None:
    """Accounts, queue, runtime and pod security of what the launcher makes."""
    placement = PodPlacement(queue="dinopipe", priority_class="dinopipe-scheduled")
    training = a_training(FULL.model_copy(update={"placement": placement}))
    manifest = trainjob(training, runtime=RUNTIME)
    assert schema_problems(manifest) == []
    assert problems([*installed["prod-gpu"], manifest]) == []


def test_every_component_is_in_an_overlay_or_known_as_extra(
    installed: Installed, extended: list[Manifest]
) -> None:
    used = {
        Path(name).name
        for overlay in WHOLE
        for name in yaml.safe_load(
            (SHIPPED / "overlays" / overlay / "kustomization.yaml").read_text()
        )["components"]
    }
    shipped = {path.name for path in (SHIPPED / "components").iterdir()}
    assert used | set(EXTRA_COMPONENTS) == shipped
    assert len(extended) > len(installed["prod-gpu"])


def test_all_components_together_are_right(extended: list[Manifest]) -> None:
    assert [wrong for item in extended for wrong in schema_problems(item)] == []
    assert problems(extended) == []


def test_external_secrets_fill_every_secret_that_pods_name(extended: list[Manifest]) -> None:
    secrets = [item["spec"] for item in extended if item["kind"] == "ExternalSecret"]
    keys = {(spec["target"]["name"], key["secretKey"]) for spec in secrets for key in spec["data"]}
    named = {
        (found["secretKeyRef"]["name"], found["secretKeyRef"]["key"])
        for item in extended
        for _, found in mappings(item)
        if "secretKeyRef" in found
    }
    assert named
    assert named <= keys


def test_every_file_belongs_to_a_kustomization() -> None:
    for directory in {path.parent for path in SHIPPED.rglob("*.yaml")}:
        listed = yaml.safe_load((directory / "kustomization.yaml").read_text())
        named = json.dumps(listed)
        files = {path.name for path in directory.glob("*.yaml")} - {"kustomization.yaml"}
        assert not {name for name in files if name not in named}, directory


def test_the_command_line_reports_what_is_wrong(installed: Installed) -> None:
    good = yaml.safe_dump_all(installed["prod-gpu"])
    bad = good.replace(f"@{DIGEST}", ":latest")
    for text, code, message in ((good, 0, ""), (bad, 2, "has no digest"), ("", 2, "no manifests")):
        ended = subprocess.run(
            [sys.executable, "-m", "k8s.rules"],
            input=text,
            capture_output=True,
            text=True,
            check=False,
        )
        assert ended.returncode == code, ended.stderr
        assert message in ended.stderr
