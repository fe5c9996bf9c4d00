"""Starts the ranks of a training in the way that the step was told."""

from __future__ import annotations

from typing import assert_never

from components.runtime.progress import Reporter
from components.train.config import TrainStage
from components.train.job import Job, Result
from components.train.local_launcher import run_ranks
from k8s.launchers import ClusterLaunch, Processes, PyTorchJobLaunch, TrainJobLaunch


def check_launch(launch: Processes | ClusterLaunch, *, stage: TrainStage) -> None:
    """Refuse a training that the launcher cannot start, before work is done.

    Raises:
        ValueError: More nodes than the launcher has.
    """
    nodes = stage.topology.num_nodes
    if isinstance(launch, Processes) and nodes > 1:
        raise ValueError(
            f"topology.num_nodes {nodes} needs a cluster launcher, and this one starts the ranks "
            "of one machine; set topology.num_nodes to 1, or placement.launcher to trainjob"
        )


def train(job: Job, *, launch: Processes | ClusterLaunch, lock: int, report: Reporter) -> Result:
    """Run all ranks of a job until they end.

    Args:
        job: What to train.
        launch: How to start the ranks.
        lock: Descriptor of the directory's lock, for ranks on this machine to keep as well.
        report: Progress of the step.

    Raises:
        StageFailed: A rank failed, was killed, or its job was deleted.
        Preempted: The training was told to stop; it can go on from its last checkpoint.
        ClusterRefused: The cluster does not take the job.
    """
    match launch:
        case Processes():
            return run_ranks(job, lock=lock)
        case TrainJobLaunch() | PyTorchJobLaunch():
            # The client of Kubernetes takes a second to load, and most runs need none.
            from components.train.cluster_job import own_pod, training_of
            from components.train.cluster_launcher import train_on_cluster
            from k8s.cluster import Cluster

            training = training_of(job, pods=launch.pods, owner=own_pod(launch.pods))
            cluster = Cluster.connected(launch.pods.placement.namespace)
            return train_on_cluster(
                job, launch=launch, training=training, cluster=cluster, report=report
            )
        case _:
            assert_never(launch)
