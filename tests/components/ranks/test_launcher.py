from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from components.ranks.launcher import check_launch, run_job
from components.runtime.context import RunContext
from components.runtime.progress import Reporter
from components.train.config import Topology, TrainStage
from components.train.job import Job
from dinov2_core.errors import SettingsError, StageFailed
from k8s.launchers import Processes, TrainJob, launch_of
from k8s.placement import PodResources
from tests.golden.manifests import BARE
from tests.k8s.api_server import TOKEN, ApiServer, api_server


@pytest.fixture
def server() -> Iterator[ApiServer]:
    with api_server() as server:
        yield server


def test_several_nodes_need_a_cluster() -> None:
    two = Topology(num_nodes=2)
    with pytest.raises(SettingsError, match=r"^embedding\.num_nodes 2 needs a cluster launcher"):
        check_launch(Processes(), topology=two, name="embedding")
    check_launch(launch_of(TrainJob(), pods=BARE), topology=two)
    check_launch(Processes(), topology=Topology(processes_per_node=2))


def test_every_rank_has_its_own_gpu() -> None:
    resources = PodResources(cpu="2", memory="4Gi", num_gpus=2)
    launch = launch_of(TrainJob(), pods=BARE.model_copy(update={"resources": resources}))
    check_launch(launch, topology=Topology(processes_per_node=2))
    with pytest.raises(
        SettingsError, match=r"topology\.processes_per_node 3 is more than the 2 GPUs"
    ):
        check_launch(launch, topology=Topology(processes_per_node=3))
    check_launch(launch_of(TrainJob(), pods=BARE), topology=Topology(processes_per_node=3))


def test_ranks_of_this_machine_need_no_client_of_a_cluster() -> None:
    code = "import sys, components.train.launch; print('kubernetes' in sys.modules)"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout.strip() == "False"


def test_a_cluster_s_launcher_makes_a_trainjob(
    server: ApiServer,
    stage: TrainStage,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "c",
        "contexts": [{"name": "c", "context": {"cluster": "k", "user": "u"}}],
        "clusters": [{"name": "k", "cluster": {"server": server.address}}],
        "users": [{"name": "u", "user": {"token": TOKEN}}],
    }
    file = tmp_path / "config"
    file.write_text(json.dumps(config))
    location = "kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION"
    monkeypatch.setattr(location, str(file))
    job = Job(
        stage_name="finetune",
        stage=stage,
        context=RunContext(workdir=str(tmp_path), run_id="run", run_name="test"),
        directory=str(tmp_path / "stage"),
        shards="",
        mlflow_run_id="",
    )
    failed = {"type": "Failed", "status": "True", "reason": "DeadlineExceeded"}
    original = server.answer

    def answer(method: str, *rest: object) -> object:
        made = original(method, *rest)  # type: ignore[arg-type]
        for found in server.jobs.values():
            found["status"] = {"conditions": [failed]}
        return made

    server.answer = answer  # type: ignore[method-assign,assignment]
    with pytest.raises(StageFailed, match="DeadlineExceeded"):
        run_job(
            job,
            launch=launch_of(TrainJob(), pods=BARE),
            lock=0,
            report=Reporter(None, stage="finetune"),
        )
    (made,) = server.jobs.values()
    assert made["kind"] == "TrainJob"
    assert made["metadata"]["name"].endswith("-finetune")
