"""What Kubeflow Trainer and JobSet do to a TrainJob, with processes for pods."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tests.components.train.networks import Machine
from tests.k8s.api_server import TOKEN, ApiServer

Node = subprocess.Popen[bytes]


def start_nodes(
    manifest: dict[str, Any], machines: list[Machine], *, port: int, logs: Path | None = None
) -> list[Node]:
    """Every pod of a TrainJob, with the variables that Trainer adds to those of the manifest."""
    trainer = manifest["spec"]["trainer"]
    given = {item["name"]: item["value"] for item in trainer["env"]}
    kept = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "HOME": "/tmp"}
    nodes = []
    for rank, machine in enumerate(machines[: trainer["numNodes"]]):
        added = {
            "PET_NNODES": str(trainer["numNodes"]),
            "PET_NPROC_PER_NODE": str(trainer["numProcPerNode"]),
            "PET_NODE_RANK": str(rank),
            "PET_MASTER_ADDR": machines[0].address,
            "PET_MASTER_PORT": str(port),
            "GLOO_SOCKET_IFNAME": machine.interface,  # a pod's own name leads to its address
        }
        output = (logs / f"node_{rank}.log").open("ab") if logs else None
        nodes.append(
            subprocess.Popen(
                [*machine.prefix, *trainer["command"]],
                env=kept | given | added,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        )
    return nodes


@dataclass(eq=False)
class Trainer(threading.Thread):
    """Runs the first TrainJob that a server gets: all pods anew when one fails, unless with 64."""

    server: ApiServer
    machines: list[Machine]
    logs: Path
    port: int
    max_restarts: int = 3
    nodes: list[Node] = field(default_factory=list)
    attempts: int = 0

    def __post_init__(self) -> None:
        super().__init__(daemon=True)

    def run(self) -> None:
        """Until the job is complete or has failed."""
        while not self.server.jobs:
            time.sleep(0.05)
        (job,) = self.server.jobs.values()
        labels = {
            "jobset.sigs.k8s.io/jobset-name": job["metadata"]["name"],
            "batch.kubernetes.io/job-completion-index": "0",
        }
        self.server.pods.append({"metadata": {"name": "node-0", "labels": labels}, "status": {}})
        while self.attempts <= self.max_restarts:
            self.nodes = start_nodes(
                job, self.machines, port=self.port + self.attempts, logs=self.logs
            )
            self.attempts += 1
            codes = self._codes(job)
            self._tell(job, ready=0)
            if codes == [0] * len(codes):
                self._tell(job, condition=("Complete", "AllJobsCompleted"))
                return
            if 64 in codes:
                self._tell(job, condition=("Failed", "FailJobSetFailurePolicyAction"))
                return
        self._tell(job, condition=("Failed", "ReachedMaxRestarts"))

    def _codes(self, job: dict[str, Any]) -> list[int]:
        while any(node.poll() is None for node in self.nodes):
            self._tell(job, ready=sum(node.poll() is None for node in self.nodes))
            time.sleep(0.1)
        return [node.returncode for node in self.nodes]

    def _tell(
        self, job: dict[str, Any], *, ready: int = 0, condition: tuple[str, str] | None = None
    ) -> None:
        text = (self.logs / "node_0.log").read_text()
        stamp = datetime.now(UTC).isoformat(timespec="microseconds").removesuffix("+00:00") + "Z"
        known = self.server.logs.setdefault("node-0", [])
        known += [f"{stamp} {line}" for line in text.splitlines()[len(known) :]]
        status: dict[str, Any] = {"jobsStatus": [{"name": "node", "ready": ready}]}
        if condition is not None:
            kind, reason = condition
            status["conditions"] = [{"type": kind, "status": "True", "reason": reason}]
        job["status"] = status


def kubeconfig(address: str, folder: Path) -> Path:
    """What leads a step to a server."""
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "c",
        "contexts": [{"name": "c", "context": {"cluster": "k", "user": "u"}}],
        "clusters": [{"name": "k", "cluster": {"server": address}}],
        "users": [{"name": "u", "user": {"token": TOKEN}}],
    }
    file = folder / "kubeconfig"
    file.write_text(json.dumps(config))
    return file
