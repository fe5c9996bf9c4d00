from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from k8s.launchers import TrainJobLaunch, read_launch
from k8s.placement import Volume
from pipelines.graph.dinov2 import compile_pipeline
from pipelines.spec.pipeline_spec import load_spec
from tests.golden.compiled import portable_spec
from tests.pipelines.specs import write_spec


def executors(folder: Path, resources: str) -> dict[str, Any]:
    path = portable_spec(folder)
    path.write_text(path.read_text() + resources)
    compile_pipeline(load_spec(path), context="{}", path=folder / "p.yaml")
    document = next(yaml.safe_load_all((folder / "p.yaml").read_text()))
    found: dict[str, Any] = document["deploymentSpec"]["executors"]
    return found


def test_resources_reach_their_task_alone(tmp_path: Path) -> None:
    found = executors(
        tmp_path, "\nresources:\n  pretrain: {cpu: '16', memory: 64Gi, num_gpus: 4}\n"
    )
    pretrain = found["exec-pretrain"]["container"]["resources"]
    assert pretrain["accelerator"]["resourceType"] == "nvidia.com/gpu"
    assert pretrain["accelerator"]["resourceCount"] == "4"
    assert pretrain["resourceMemoryRequest"] == "64Gi"
    assert "accelerator" not in found["exec-curate"]["container"]["resources"]


def test_all_tasks_run_the_image_of_the_spec(tmp_path: Path) -> None:
    digest = "registry/dinopipe@sha256:" + "a" * 64
    found = executors(tmp_path, f"\nimage: {digest}\n")
    assert {executor["container"]["image"] for executor in found.values()} == {digest}


PLACED = """
image: registry/dinopipe@sha256:{digest}
resources:
  pretrain: {{cpu: '16', memory: 64Gi, num_gpus: 8}}
  evaluate: {{num_gpus: 1}}
placement:
  launcher: {{kind: {launcher}}}
  namespace: team
  queue: research
  priority_class: nightly
  node_selector: {{nvidia.com/gpu.product: H100}}
  tolerations:
    - {{key: nvidia.com/gpu, effect: NoSchedule}}
    - {{key: pool, operator: Equal, value: spot, effect: NoExecute, seconds: 60}}
  affinity:
    required: [{{key: zone, values: [a, b]}}, {{key: cpus, operator: Gt, values: ['8']}}]
    preferred: [{{key: ssd, operator: Exists, weight: 10}}]
  shared_memory: 16Gi
  environment: {{NCCL_IB_HCA: mlx5}}
  secrets: [{{name: store, keys: [AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY]}}]
  image_pull_secrets: [registry]
  volume: {{claim: work, mount_path: /mnt/work}}
  deadlines: {{training_seconds: 3600, step_seconds: 7200, pipeline_seconds: 86400}}
  retries: {{count: 3, backoff_seconds: 30}}
"""


def placed(
    folder: Path, launcher: str, **curate: Any
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Tasks, containers and pods of a spec that says everything."""
    path = portable_spec(folder)
    path.write_text(path.read_text() + PLACED.format(digest="a" * 64, launcher=launcher))
    if curate:
        values = yaml.safe_load(path.read_text())
        values["curate"] = values.get("curate", {}) | curate
        values["resources"]["curate"] = {"cpu": "8", "memory": "32Gi", "num_gpus": 4}
        write_spec(values, path)
    compile_pipeline(load_spec(path), context="{}", path=folder / "p.yaml")
    document, platform = yaml.safe_load_all((folder / "p.yaml").read_text())
    pods = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    containers = document["deploymentSpec"]["executors"]
    return (
        document["root"]["dag"]["tasks"],
        {name.removeprefix("exec-"): item["container"] for name, item in containers.items()},
        {name.removeprefix("exec-"): item for name, item in pods.items()},
    )


def test_nodes_queue_and_devices_reach_the_pods_that_need_them(tmp_path: Path) -> None:
    _tasks, containers, pods = placed(tmp_path, "processes")
    for stage in ("pretrain", "finetune", "evaluate"):
        pod = pods[stage]
        assert pod["nodeSelector"]["labels"] == {"nvidia.com/gpu.product": "H100"}
        assert [item["operator"] for item in pod["tolerations"]] == ["Exists", "Equal"]
        assert pod["tolerations"][1]["tolerationSeconds"] == "60"
        required, preferred = pod["nodeAffinity"]
        assert [item["key"] for item in required["matchExpressions"]] == ["zone", "cpus"]
        assert preferred["weight"] == 10
        assert pod["podMetadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "research"
        assert pod["podMetadata"]["labels"]["kueue.x-k8s.io/priority-class"] == "nightly"
        assert pod["emptyDirMounts"] == [
            {
                "volumeName": "shared-memory",
                "mountPath": "/dev/shm",
                "medium": "Memory",
                "sizeLimit": "16Gi",
            }
        ]
        assert {"name": "NCCL_IB_HCA", "value": "mlx5"} in containers[stage]["env"]
    for stage in ("curate", "register"):
        assert pods[stage].keys().isdisjoint({"nodeSelector", "tolerations", "emptyDirMounts"})
        assert "env" not in containers[stage]


def test_secrets_volume_time_and_retries_reach_every_pod(tmp_path: Path) -> None:
    tasks, _containers, pods = placed(tmp_path, "processes")
    for stage, pod in pods.items():
        (secret,) = pod["secretAsEnv"]
        assert secret["secretName"] == "store"
        assert [item["envVar"] for item in secret["keyToEnv"]] == [
            "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"
        ]  # fmt: skip
        assert pod["imagePullSecret"][0]["secretName"] == "registry"
        assert pod["pvcMount"][0]["mountPath"] == "/mnt/work"
        assert pod["activeDeadlineSeconds"] == "7200"
        assert pod["podMetadata"]["labels"]["dinopipe/stage"] == stage
        assert tasks[stage]["retryPolicy"]["maxRetryCount"] == 3
        assert tasks[stage]["retryPolicy"]["backoffDuration"] == "30s"
        assert tasks[stage]["retryPolicy"]["backoffMaxDuration"] == "86400s"
        assert pod["securityContext"] == {
            "runAsUser": "10001", "runAsGroup": "10001", "runAsNonRoot": True
        }  # fmt: skip
    platform = list(yaml.safe_load_all((tmp_path / "p.yaml").read_text()))[1]
    deadline = platform["platforms"]["kubernetes"]["pipelineConfig"]["activeDeadlineSeconds"]
    assert deadline == 86400


def test_a_step_that_follows_a_training_is_small_and_knows_its_pod(tmp_path: Path) -> None:
    tasks, containers, pods = placed(tmp_path, "trainjob")
    for stage in ("pretrain", "finetune"):
        assert "accelerator" not in containers[stage]["resources"]
        assert containers[stage]["resources"]["resourceMemoryLimit"] == "2Gi"
        assert pods[stage].keys().isdisjoint({"nodeSelector", "tolerations", "emptyDirMounts"})
        fields = {item["name"]: item["fieldPath"] for item in pods[stage]["fieldPathAsEnv"]}
        assert fields == {
            "POD_NAME": "metadata.name",
            "POD_UID": "metadata.uid",
            "POD_NAMESPACE": "metadata.namespace",
        }
    launch = read_launch(
        tasks["pretrain"]["inputs"]["parameters"]["launcher"]["runtimeValue"]["constant"]
    )
    assert isinstance(launch, TrainJobLaunch)
    assert launch.pods.resources.num_gpus == 8
    assert launch.pods.deadline_seconds == 3600
    assert launch.pods.placement.queue == "research"
    assert launch.pods.placement.volume == Volume(claim="work", mount_path="/mnt/work")
    assert launch.pods.image.endswith("a" * 64)
    finetune = tasks["finetune"]["inputs"]["parameters"]["launcher"]["runtimeValue"]["constant"]
    assert '"num_gpus":0' in finetune


NETWORK = {"kind": "timm", "name": "vit_small_patch14_dinov2.lvd142m"}


def test_an_embedding_has_its_gpus_on_pods_of_its_own(tmp_path: Path) -> None:
    topology = {"num_nodes": 2, "processes_per_node": 4}
    tasks, containers, pods = placed(
        tmp_path, "trainjob", embedding=NETWORK, embedding_topology=topology
    )
    resources = containers["curate"]["resources"]
    assert "accelerator" not in resources
    assert (resources["resourceCpuRequest"], resources["resourceMemoryLimit"]) == ("8", "32Gi")
    assert pods["curate"].keys().isdisjoint({"nodeSelector", "tolerations", "emptyDirMounts"})
    assert {item["name"] for item in pods["curate"]["fieldPathAsEnv"]} == {
        "POD_NAME", "POD_UID", "POD_NAMESPACE"
    }  # fmt: skip
    launch = read_launch(
        tasks["curate"]["inputs"]["parameters"]["launcher"]["runtimeValue"]["constant"]
    )
    assert isinstance(launch, TrainJobLaunch)
    asked = launch.pods.resources
    assert (asked.cpu, asked.memory, asked.num_gpus) == ("8", "32Gi", 4)


@pytest.mark.parametrize(
    ("launcher", "settings"),
    [
        ("trainjob", {"embedding": NETWORK}),
        ("trainjob", {"embedding_topology": {"processes_per_node": 1}}),
        ("processes", {"embedding": NETWORK, "embedding_topology": {"processes_per_node": 4}}),
    ],
)
def test_an_embedding_in_the_stage_s_own_pod_has_its_gpus_there(
    launcher: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    _tasks, containers, pods = placed(tmp_path, launcher, **settings)
    assert containers["curate"]["resources"]["accelerator"]["resourceCount"] == "4"
    assert pods["curate"]["nodeSelector"]["labels"] == {"nvidia.com/gpu.product": "H100"}
    assert "fieldPathAsEnv" not in pods["curate"]
