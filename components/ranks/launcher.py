"""Starts the ranks of a stage with the launcher that its settings name."""

from __future__ import annotations

import argparse
from typing import assert_never

from components.ranks.config import Topology
from components.ranks.job import RanksJob
from components.ranks.local_launcher import run_ranks
from components.runtime.progress import Reporter
from dinov2_core.errors import SettingsError
from k8s.launchers import Processes, TrainJobLaunch


def add_launcher_flag(parser: argparse.ArgumentParser) -> None:
    """The flag of every stage that has ranks."""
    parser.add_argument(
        "--launcher", default='{"kind":"processes"}', help="how the ranks are started, JSON"
    )


def check_launch(
    launch: Processes | TrainJobLaunch, *, topology: Topology, name: str = "topology"
) -> None:
    """Make sure that the launcher can start the ranks, before work is done.

    Args:
        launch: How the ranks would be started.
        topology: How many there would be.
        name: Key of the topology in the stage's settings.

    Raises:
        SettingsError: More nodes than the launcher has, or more ranks on a node than it has GPUs.
    """
    nodes, ranks = topology.num_nodes, topology.processes_per_node
    if isinstance(launch, Processes):
        if nodes > 1:
            raise SettingsError(
                f"{name}.num_nodes {nodes} needs a cluster launcher, and this one starts the ranks "
                f"of one machine; set {name}.num_nodes to 1, or placement.launcher to trainjob"
            )
        return
    gpus = launch.pods.resources.num_gpus
    if gpus and ranks > gpus:
        raise SettingsError(
            f"{name}.processes_per_node {ranks} is more than the {gpus} GPUs of each pod "
            f"(resources.*.num_gpus), and every rank needs its own; set one to the other"
        )


def run_job(
    job: RanksJob, *, launch: Processes | TrainJobLaunch, lock: int, report: Reporter
) -> None:
    """Run all ranks of a job until it is finished.

    Args:
        job: That they work on.
        launch: How to start the ranks.
        lock: Descriptor of the directory's lock, for ranks on this machine to keep as well.
        report: Progress of the step.

    Raises:
        UserError: A rank met what the user must change.
        StageFailed: A rank failed, was killed, or its job was deleted.
        Stopped: The ranks were stopped; they can go on from what they saved.
        ClusterRefused, ClusterUnavailable: The cluster does not take the job, or does not answer.
    """
    match launch:
        case Processes():
            run_ranks(job, lock=lock)
        case TrainJobLaunch():
            # The client of Kubernetes takes a second to load, and most runs need none.
            from components.ranks.cluster_job import own_pod, training_of
            from components.ranks.cluster_launcher import run_on_cluster
            from k8s.cluster import Cluster

            training = training_of(job, pods=launch.pods, owner=own_pod(launch.pods))
            cluster = Cluster.connected(launch.pods.placement.namespace)
            run_on_cluster(job, launch=launch, training=training, cluster=cluster, report=report)
        case _:
            assert_never(launch)
