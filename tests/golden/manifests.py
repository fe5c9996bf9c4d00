"""The golden jobs of ranks: `python -m tests.golden.manifests` writes them anew."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from components.curate.config import CurateSettings, TimmEmbedding
from components.curate.job import EmbeddingJob, ImageSet
from components.ranks.cluster_job import training_of
from components.ranks.config import Topology
from components.runtime.context import RunContext
from k8s.placement import (
    Affinity,
    NodePreference,
    NodeRequirement,
    NodeTopology,
    PodPlacement,
    PodResources,
    Rdma,
    SecretKeys,
    Toleration,
    TrainingPods,
    Volume,
)
from k8s.training import Owner, Training
from k8s.trainjob import trainjob

FOLDER = Path(__file__).parent / "manifests"

BARE = TrainingPods(
    image="registry.example/dinopipe@sha256:" + "a" * 64,
    resources=PodResources(cpu="2", memory="4Gi"),
    placement=PodPlacement(namespace="team", shared_memory=None),
    deadline_seconds=3600,
)
"""Pods that ask for nothing."""

FULL = TrainingPods(
    image="registry.example/dinopipe@sha256:" + "b" * 64,
    resources=PodResources(cpu="64", memory="512Gi", num_gpus=8),
    placement=PodPlacement(
        namespace="team",
        queue="research",
        priority_class="nightly",
        node_selector={"nvidia.com/gpu.product": "NVIDIA-H100-80GB-HBM3"},
        tolerations=(
            Toleration(key="nvidia.com/gpu", effect="NoSchedule"),
            Toleration(key="pool", operator="Equal", value="spot", effect="NoExecute", seconds=120),
        ),
        affinity=Affinity(
            required=(NodeRequirement(key="zone", values=("a", "b")),),
            preferred=(NodePreference(key="fast-disk", operator="Exists", weight=10),),
        ),
        topology=NodeTopology(level="topology.example/rack", is_required=True),
        shared_memory="64Gi",
        environment={"NCCL_IB_HCA": "mlx5", "FI_PROVIDER": "efa"},
        secrets=(
            SecretKeys(name="store", keys=("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")),
            SecretKeys(name="mlflow", keys=("MLFLOW_TRACKING_TOKEN",)),
        ),
        image_pull_secrets=("registry",),
        rdma=Rdma(resource="rdma/ib", count=8),
        volume=Volume(claim="dinopipe-work", mount_path="/mnt/dinopipe"),
    ),
    deadline_seconds=604800,
)
"""Pods that ask for all there is."""

AGENT = ("python3", "-m", "components.ranks.torchrun_entry")
OWNER = Owner(name="step-pod", uid="1f2e3d4c")


def training(pods: TrainingPods, *, num_nodes: int = 4) -> Training:
    """A training on such pods."""
    return Training(
        run_id="0b1f7f0e-6a3c-4f3e-9f5e-7a1c2d3e4f50",
        run_name="vitl14",
        stage="pretrain",
        command=(*AGENT, "components.train.worker", "/mnt/dinopipe/job.json"),
        num_nodes=num_nodes,
        processes_per_node=8,
        environment={"MLFLOW_TRACKING_URI": "https://mlflow.example", "OMP_NUM_THREADS": "2"},
        passing_environment={"MLFLOW_RUN_ID": "c0ffee"},
        content_sha256="c" * 64,
        pods=pods,
        owner=OWNER,
    )


def embedding(pods: TrainingPods) -> Training:
    """The ranks that embed for curation, on such pods."""
    network = TimmEmbedding(name="vit_small_patch14_dinov2.lvd142m", weights="/mnt/w.safetensors")
    topology = Topology(num_nodes=4, processes_per_node=8, loader_threads=6)
    job = EmbeddingJob(
        context=RunContext(
            workdir="/mnt/dinopipe",
            run_id="0b1f7f0e-6a3c-4f3e-9f5e-7a1c2d3e4f50",
            run_name="vitl14",
            tracking_uri="https://mlflow.example",
        ),
        directory="/mnt/dinopipe/stages/curate/0123456789abcdef",
        mlflow_run_id="c0ffee",
        settings=CurateSettings(embedding=network, embedding_topology=topology),
        sets=(ImageSet(role="source", uris=("s3://bucket/pile",), num_files=1_000_000),),
    )
    asked = training_of(job, pods=pods, owner=OWNER)
    variables = {name: asked.environment[name] for name in asked.environment if name[:3] != "AWS"}
    return replace(asked, environment=variables)  # those are of whoever runs this


def manifests() -> dict[str, dict[str, Any]]:
    """Every golden manifest by its file's name."""
    runtime = "dinopipe-fsdp-v1"
    return {
        "trainjob_bare": trainjob(training(BARE), runtime=runtime),
        "trainjob_full": trainjob(training(FULL), runtime=runtime),
        "trainjob_embedding": trainjob(embedding(FULL), runtime=runtime),
    }


def read(name: str) -> dict[str, Any]:
    """A manifest as it was agreed."""
    found: dict[str, Any] = yaml.safe_load((FOLDER / f"{name}.yaml").read_text())
    return found


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name, manifest in manifests().items():
        (FOLDER / f"{name}.yaml").write_text(yaml.safe_dump(manifest, sort_keys=False))
