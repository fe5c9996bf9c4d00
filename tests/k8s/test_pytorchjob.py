from __future__ import annotations

import pytest

from k8s.rules import problems
from tests.golden.manifests import manifests, read
from tests.k8s.schemas import schema_problems

NAMES = ("pytorchjob_bare", "pytorchjob_full")


@pytest.mark.parametrize("name", NAMES)
def test_the_manifest_equals_the_golden_file(name: str) -> None:
    assert manifests()[name] == read(name), "if this is meant: python -m tests.golden.manifests"


@pytest.mark.parametrize("name", NAMES)
def test_pods_are_those_of_kubernetes_and_fit_a_restricted_namespace(name: str) -> None:
    for replicas in manifests()[name]["spec"]["pytorchReplicaSpecs"].values():
        pod = replicas["template"]["spec"]
        template = {**replicas["template"], "spec": {**pod, "restartPolicy": "OnFailure"}}
        job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "j"}}
        assert schema_problems({**job, "spec": {"template": template}}) == []
    found = problems([manifests()[name]])
    assert [problem for problem in found if "is not among these manifests" not in problem] == []


def test_the_master_is_one_of_the_nodes() -> None:
    counts = [
        {
            kind: item["replicas"]
            for kind, item in manifests()[name]["spec"]["pytorchReplicaSpecs"].items()
        }
        for name in NAMES
    ]
    assert counts == [{"Master": 1}, {"Master": 1, "Worker": 3}]


def test_it_is_not_elastic_and_has_limits() -> None:
    spec = manifests()["pytorchjob_full"]["spec"]
    assert "elasticPolicy" not in spec
    assert spec["nprocPerNode"] == "8"
    assert spec["runPolicy"]["activeDeadlineSeconds"] == 604800
    assert spec["runPolicy"]["backoffLimit"] == 3
