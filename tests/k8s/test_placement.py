from __future__ import annotations

import json

import pytest
from pydantic import BaseModel, ValidationError

from k8s.placement import (
    Affinity,
    Deadlines,
    NodePreference,
    NodeRequirement,
    PodPlacement,
    PodResources,
    Rdma,
    SecretKeys,
    Toleration,
    Volume,
)


def refused(model: type[BaseModel], **values: object) -> str:
    with pytest.raises(ValidationError) as error:
        model.model_validate_json(json.dumps(values))
    return str(error.value)


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"operator": "Bogus"}, "'Exists' or 'Equal'"),
        ({"key": "k", "value": "v"}, "value 'v' has no effect with operator Exists"),
        ({"operator": "Equal", "value": "v"}, "operator Equal needs a key"),
        ({"effect": "NoRun"}, "'NoSchedule'"),
        ({"effect": "NoSchedule", "seconds": 3}, "seconds 3 has no effect with effect"),
        ({"effect": "NoExecute", "seconds": -1}, "greater than or equal to 0"),
        ({"key": "a b"}, "is not a label key"),
    ],
)
def test_tolerations_that_kubeflow_takes_silently_are_refused(
    values: dict[str, object], reason: str
) -> None:
    assert reason in refused(Toleration, **values)


@pytest.mark.parametrize(
    ("operator", "values", "reason"),
    [
        ("In", [], "which takes at least one value"),
        ("Exists", ["a"], "which takes no values"),
        ("Gt", ["a"], "which takes one whole number"),
        ("Lt", ["1", "2"], "which takes one whole number"),
        ("Is", ["a"], "'In'"),
        ("In", ["a b"], "is not a label value"),
    ],
)
def test_requirements_have_the_values_of_their_operator(
    operator: str, values: list[str], reason: str
) -> None:
    assert reason in refused(NodeRequirement, key="zone", operator=operator, values=values)


def test_requirements_that_fit_are_taken() -> None:
    assert NodeRequirement(key="cpus", operator="Gt", values=("8",)).values == ("8",)
    assert NodePreference(key="ssd", operator="Exists").weight == 50


@pytest.mark.parametrize(
    ("model", "values", "reason"),
    [
        (Affinity, {}, "neither required nor preferred"),
        (NodePreference, {"key": "a", "operator": "Exists", "weight": 101}, "less than or equal"),
        (Volume, {"claim": "c", "mount_path": "mnt"}, "is not a mount path"),
        (Volume, {"claim": "C", "mount_path": "/m"}, "is not a DNS name"),
        (SecretKeys, {"name": "s", "keys": []}, "at least 1"),
        (SecretKeys, {"name": "s", "keys": ["PET_NNODES"]}, "which Kubeflow Trainer sets"),
        (Rdma, {"resource": "ib"}, "is not an RDMA resource"),
        (Rdma, {"count": 0}, "greater than or equal to 1"),
        (PodResources, {"cpu": "2", "memory": "64Q"}, "is not a quantity"),
        (PodResources, {"cpu": "2", "memory": "1Gi", "num_gpus": -1}, "greater than or equal"),
        (PodPlacement, {"queue": "My_Queue"}, "is not a DNS label"),
        (PodPlacement, {"priority_class": "high"}, "has no effect without a queue"),
        (PodPlacement, {"shared_memory": "64Q"}, "is not a quantity"),
        (PodPlacement, {"node_selector": {"a b": "c"}}, "is not a label key"),
        (PodPlacement, {"node_selector": {"a": "b c"}}, "is not a label value"),
        (PodPlacement, {"image_pull_secrets": ["A"]}, "is not a DNS name"),
        (PodPlacement, {"nodeSelector": {}}, "Extra inputs are not permitted"),
        (Deadlines, {"training_seconds": -5}, "greater than or equal to 60"),
        (Deadlines, {"step_seconds": 600}, "must grow in this order"),
        (Deadlines, {"step_seconds": 9000000}, "must grow in this order"),
    ],
)
def test_nonsense_is_refused_in_words(
    model: type[BaseModel], values: dict[str, object], reason: str
) -> None:
    assert reason in refused(model, **values)


@pytest.mark.parametrize("name", ["HOME", "MLFLOW_TRACKING_URI", "PET_NNODES", "nccl_debug"])
def test_only_variables_of_networks_and_threads_are_open(name: str) -> None:
    assert f"{name} may not be set here" in refused(PodPlacement, environment={name: "1"})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("NCCL_TOKEN", "x"),
        ("TORCH_ACCESS_KEY", "x"),
        ("NCCL_NET", "https://me:word@host"),
        ("NCCL_NET", "AKIAIOSFODNN7EXAMPLE"),
        ("NCCL_NET", "-----BEGIN PRIVATE KEY-----"),
        ("NCCL_NET", "hf_abcdefghijklmnop"),
        ("NCCL_NET", "wJalrXUtnFEMIK7MDENGbPxRfiCYEXAMPLEKEY"),
    ],
)
def test_what_looks_like_a_secret_is_refused(name: str, value: str) -> None:
    assert f"{name} looks like a secret" in refused(PodPlacement, environment={name: value})


def test_settings_of_networks_are_taken() -> None:
    environment = {
        "NCCL_IB_HCA": "=mlx5_0:1,mlx5_1:1",
        "NCCL_SOCKET_IFNAME": "eth0",
        "NCCL_TOPO_FILE": "/opt/topology/h100-8x.xml",
        "UCX_TLS": "rc,cuda_copy",
        "FI_EFA_USE_DEVICE_RDMA": "1",
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1",
    }
    assert PodPlacement(environment=environment).environment == environment


def test_a_variable_has_one_source() -> None:
    secrets = [{"name": "a", "keys": ["X"]}, {"name": "b", "keys": ["X"]}]
    assert "X has two sources" in refused(PodPlacement, secrets=secrets)
