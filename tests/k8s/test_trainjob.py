from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from dinov2_core.errors import ExitCode
from k8s.launchers import RUNTIME
from k8s.rules import problems
from k8s.trainjob import CONTAINER, GROUP, PLURAL
from tests.golden.manifests import manifests, read
from tests.k8s.schemas import schema_problems

REPOSITORY = Path(__file__).parents[2]
NAMES = ("trainjob_bare", "trainjob_full", "trainjob_embedding")


@pytest.mark.parametrize("name", NAMES)
def test_the_manifest_equals_the_golden_file(name: str) -> None:
    assert manifests()[name] == read(name), "if this is meant: python -m tests.golden.manifests"


@pytest.mark.parametrize("name", NAMES)
def test_official_models_know_every_field(name: str) -> None:
    assert schema_problems(manifests()[name]) == []


def test_the_check_finds_a_field_of_an_older_trainer() -> None:
    manifest = manifests()["trainjob_full"]
    manifest["spec"]["podTemplateOverrides"] = manifest["spec"].pop("runtimePatches")
    assert schema_problems(manifest) == ["spec.podTemplateOverrides: unknown field"]


@pytest.mark.parametrize("name", NAMES)
def test_our_own_rules_hold(name: str) -> None:
    found = problems([manifests()[name]])
    assert [problem for problem in found if "is not among these manifests" not in problem] == []


def test_ranks_are_counted_so_that_trainer_sets_its_variables() -> None:
    for name in NAMES:
        manifest = manifests()[name]
        trainer = manifest["spec"]["trainer"]
        assert (trainer["numNodes"], trainer["numProcPerNode"]) == (4, 8)
        assert not [item for item in trainer["env"] if item["name"].startswith("PET_")]
        assert "suspend" not in manifest["spec"]


def test_no_variable_is_patched_into_the_container() -> None:
    (patch,) = manifests()["trainjob_full"]["spec"]["runtimePatches"]
    template = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"][0]["template"]
    (container,) = template["spec"]["template"]["spec"]["containers"]
    assert container.keys() == {"name", "volumeMounts"}


def base(file: str, kind: str) -> list[dict[str, Any]]:
    """Manifests of a kind in one of the shipped files."""
    found = yaml.safe_load_all((REPOSITORY / "k8s" / "base" / file).read_text())
    return [manifest for manifest in found if manifest["kind"] == kind]


def test_patches_name_what_our_runtime_has() -> None:
    (runtime,) = base("runtime.yaml", "TrainingRuntime")
    manifest = manifests()["trainjob_full"]
    assert runtime["metadata"]["name"] == manifest["spec"]["runtimeRef"]["name"] == RUNTIME
    (ours,) = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    (patch,) = manifest["spec"]["runtimePatches"]
    (patched,) = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    pods = [item["template"]["spec"]["template"]["spec"] for item in (ours, patched)]
    assert ours["name"] == patched["name"]
    assert [pod["containers"][0]["name"] for pod in pods] == [CONTAINER, CONTAINER]
    mounts = [
        {item["mountPath"]: item["name"] for item in pod["containers"][0]["volumeMounts"]}
        for pod in pods
    ]
    both = mounts[0].keys() & mounts[1].keys()
    assert both == {"/dev/shm"}
    assert mounts[0]["/dev/shm"] == mounts[1]["/dev/shm"], "one replaces the other"


def test_our_runtime_ends_a_job_at_the_agent_s_code_for_wrong_input() -> None:
    (runtime,) = base("runtime.yaml", "TrainingRuntime")
    (job,) = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    rules = job["template"]["spec"]["podFailurePolicy"]["rules"]
    (ending,) = [rule["onExitCodes"] for rule in rules if rule["action"] == "FailJob"]
    assert (ending["containerName"], ending["values"]) == (CONTAINER, [ExitCode.POD_USER_ERROR])


def test_the_launcher_s_role_holds_what_its_client_asks_for() -> None:
    granted = {
        (group, resource, verb)
        for role in base("launcher.yaml", "Role")
        for rule in role["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }
    asked = {(GROUP, PLURAL, verb) for verb in ("create", "get", "patch", "delete")}
    asked |= {("", "pods", "list"), ("", "pods/log", "get"), ("", "events", "list")}
    assert asked <= granted
