from __future__ import annotations

from dataclasses import replace

import pytest

from k8s.placement import TrainingPods
from k8s.training import HASH_ANNOTATION, Owner, Training, environment_of, pod_spec_of
from k8s.trainjob import trainjob
from tests.golden.manifests import BARE, FULL, training


def digest(item: Training) -> str:
    value: str = trainjob(item, runtime="r")["metadata"]["annotations"][HASH_ANNOTATION]
    return value


def test_every_attempt_at_a_step_has_the_same_name_and_digest() -> None:
    first = training(FULL)
    retried = replace(
        first,
        owner=Owner(name="second-pod", uid="other"),
        passing_environment={"MLFLOW_RUN_ID": "another"},
    )
    assert (first.name, digest(first)) == (retried.name, digest(retried))


@pytest.mark.parametrize(
    "change",
    [
        {"content_sha256": "d" * 64},
        {"num_nodes": 2},
        {"environment": {"OMP_NUM_THREADS": "4"}},
        {"pods": FULL.model_copy(update={"image": "i@sha256:" + "9" * 64})},
        {"pods": BARE},
    ],
)
def test_other_settings_have_another_digest(change: dict[str, object]) -> None:
    first = training(FULL)
    assert digest(replace(first, **change)) != digest(first)  # type: ignore[arg-type]


def test_other_runs_and_stages_have_other_names() -> None:
    first = training(FULL)
    others = [replace(first, run_id="2"), replace(first, stage="finetune")]
    assert len({item.name for item in (first, *others)}) == 3


def test_names_leave_room_for_those_of_pods() -> None:
    long = replace(training(FULL), run_name="a-very-long-name-of-a-pipeline-spec-for-once")
    assert len(f"{long.name}-node-0-1023-abcde") <= 63


def test_secrets_are_only_named() -> None:
    found = {item["name"]: item for item in environment_of(training(FULL))}
    assert found["AWS_SECRET_ACCESS_KEY"] == {
        "name": "AWS_SECRET_ACCESS_KEY",
        "valueFrom": {"secretKeyRef": {"name": "store", "key": "AWS_SECRET_ACCESS_KEY"}},
    }
    assert found["NCCL_IB_HCA"]["value"] == "mlx5"
    assert len(found) == len(environment_of(training(FULL)))


@pytest.mark.parametrize("is_required", [True, False])
def test_without_a_queue_pods_draw_each_other_to_one_place(is_required: bool) -> None:
    assert FULL.placement.topology is not None
    topology = FULL.placement.topology.model_copy(update={"is_required": is_required})
    change = {"queue": None, "priority_class": None, "topology": topology}
    pods = FULL.model_copy(update={"placement": FULL.placement.model_copy(update=change)})
    item = training(TrainingPods.model_validate_json(pods.model_dump_json()))
    affinity = pod_spec_of(item)["affinity"]["podAffinity"]
    kind = "required" if is_required else "preferred"
    ((found, (term,)),) = affinity.items()
    assert found == f"{kind}DuringSchedulingIgnoredDuringExecution"
    term = term if is_required else term["podAffinityTerm"]
    assert term["topologyKey"] == "topology.example/rack"
    assert term["labelSelector"]["matchLabels"] == {"dinopipe/job": item.name}
    assert item.labels["dinopipe/job"] == item.name


def test_a_pod_that_asks_for_nothing_has_no_empty_keys() -> None:
    assert pod_spec_of(training(BARE)) == {"serviceAccountName": "dinopipe-trainer"}
