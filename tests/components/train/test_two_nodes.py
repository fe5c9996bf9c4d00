"""Two nodes run a training by the command of a TrainJob's pod; one is lost, both start again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import mlflow
import pytest
import torch
from safetensors.torch import load_file

from components.ranks.cluster_job import training_of
from components.runtime.context import RunContext
from components.runtime.manifests import CheckpointManifest, DatasetManifest, digest_of_file
from components.runtime.tracking import Tracker
from components.train.config import Topology, TrainStage
from components.train.job import Job, read_result
from k8s.launchers import RUNTIME, TrainJob, launch_of
from k8s.trainjob import trainjob
from tests.components.train.networks import Machine, two_machines
from tests.components.train.trainer import Node, Trainer, kubeconfig, start_nodes
from tests.golden.manifests import BARE
from tests.k8s.api_server import api_server


@pytest.fixture(scope="module")
def machines() -> Iterator[list[Machine]]:
    with two_machines() as machines:
        yield machines


def start(job: Job, machines: list[Machine], *, port: int) -> list[Node]:
    """Both pods of the job's TrainJob."""
    job.write()
    training = training_of(job, pods=BARE, owner=None)
    manifest = trainjob(training, runtime=RUNTIME)
    return start_nodes(manifest, machines, port=port)


def codes(nodes: list[Node]) -> list[int]:
    return [node.wait(timeout=240) for node in nodes]


def wait_for(found: Callable[[], bool], *, seconds: float = 240) -> None:
    end = time.monotonic() + seconds
    while not found():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.02)


def job_in(name: str, *, stage: TrainStage, dataset: DatasetManifest, context: RunContext) -> Job:
    run = Tracker(context).stage("pretrain", key=name)
    topology = Topology(num_nodes=2, threads_per_process=1, loader_threads=1)
    return Job(
        stage_name="pretrain",
        stage=stage.model_copy(update={"topology": topology}),
        context=context,
        directory=str(context.root / name),
        shards=dataset.shards_uri,
        mlflow_run_id=run.run_id,
    )


def lose(node: Node) -> None:
    """End a node without a word, with everything on it."""
    os.killpg(node.pid, signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_lost_node_costs_only_the_steps_since_the_last_checkpoint(
    stage: TrainStage, dataset: DatasetManifest, context: RunContext, machines: list[Machine]
) -> None:
    straight = job_in("straight", stage=stage, dataset=dataset, context=context)
    assert codes(start(straight, machines, port=29511)) == [0, 0]

    disturbed = job_in("disturbed", stage=stage, dataset=dataset, context=context)
    nodes = start(disturbed, machines, port=29512)
    wait_for(lambda: (disturbed.checkpoints / "step_00000010").exists())
    lose(nodes[1])
    assert nodes[0].wait(timeout=120) == 1, "lost peers are no fault of the input"
    assert read_result(disturbed) is None

    assert codes(start(disturbed, machines, port=29513)) == [0, 0]
    result = read_result(disturbed)
    assert result is not None
    assert result.step == 60
    weights, expected = load_file(disturbed.teacher), load_file(straight.teacher)
    assert weights.keys() == expected.keys()
    torch.testing.assert_close(weights, expected, rtol=0, atol=0)
    client = mlflow.MlflowClient(context.resolved_tracking_uri)
    history = client.get_metric_history(disturbed.mlflow_run_id, "loss/total")
    assert Counter(point.step for point in history) == Counter(range(60))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_wrong_input_ends_every_node_with_its_code(
    stage: TrainStage, dataset: DatasetManifest, context: RunContext, machines: list[Machine]
) -> None:
    weights = context.root / "weights.safetensors"
    weights.write_bytes(b"not one")
    job = job_in("wrong", stage=stage, dataset=dataset, context=context)
    job = job.model_copy(update={"starting_weights": str(weights)})
    assert 64 in codes(start(job, machines, port=29514))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_step_follows_its_nodes_through_a_loss_to_its_manifest(
    stage: TrainStage,
    dataset: DatasetManifest,
    flags: Callable[[TrainStage, DatasetManifest], list[str]],
    context: RunContext,
    machines: list[Machine],
    tmp_path: Path,
) -> None:
    topology = Topology(num_nodes=2, threads_per_process=1, loader_threads=1)
    two_nodes = stage.model_copy(update={"topology": topology})
    launch = launch_of(TrainJob(), pods=BARE)
    with api_server() as server:
        trainer = Trainer(server, machines, logs=tmp_path, port=29521)
        trainer.start()
        step = subprocess.Popen(
            [
                *(sys.executable, "-m", "components.train", "--phase", "pretrain"),
                *flags(two_nodes, dataset),
                *("--launcher", launch.model_dump_json(), "--output", str(tmp_path / "out.json")),
            ],
            env=os.environ | {"KUBECONFIG": str(kubeconfig(server.address, tmp_path))},
            stderr=subprocess.PIPE,
            text=True,
        )
        found = "stages/pretrain/*/checkpoints/step_00000010"
        wait_for(lambda: any(context.root.glob(found)))
        lose(trainer.nodes[1])
        _, log = step.communicate(timeout=400)
    assert step.returncode == 0, log
    assert trainer.attempts == 2
    manifest = CheckpointManifest.read(tmp_path / "out.json")
    assert manifest.step == 60
    assert manifest.sha256 == digest_of_file(Path(manifest.teacher_uri))
    said = [line.partition(": ")[2] for line in log.splitlines() if line.startswith("TrainJob ")]
    assert said[0] == "created"
    assert said[-1] == "complete (AllJobsCompleted)"
    assert "running" in said
    assert len(server.made("DELETE")) == 1, "it was deleted when it was done"
