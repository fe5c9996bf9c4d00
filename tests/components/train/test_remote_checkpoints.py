"""remote_checkpoints: checkpoints in a bucket survive broken lines, lost nodes and the end."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import boto3
import pytest

from components.runtime import s3 as door
from components.runtime.context import RunContext
from components.runtime.manifests import DatasetManifest, digest_of_file
from components.runtime.storage import exists, list_names, read_text, upload
from components.runtime.uris import cache_directory, local_path
from components.train.config import Topology, TrainStage
from components.train.job import Job, read_result
from components.train.remote_checkpoints import StoredCheckpoints, remote_checkpoints_of
from dinov2_core.distributed.checkpoint import MARKER
from dinov2_core.errors import ExitCode
from tests.s3_server import BadLine

HOME = "s3://pile/run/stages/pretrain/0/checkpoints"


@pytest.fixture
def checkpoint(s3: str) -> Path:
    """A checkpoint's directory in the spool."""
    folder = local_path(HOME) / "step_00000005"
    folder.mkdir(parents=True)
    for name in (".metadata", "__0_0.distcp", MARKER):
        (folder / name).write_text(name)
    return folder


def stored(**records: str) -> StoredCheckpoints:
    return StoredCheckpoints(HOME, records={local_path(uri): uri for uri in records.values()})


def test_a_checkpoint_is_valid_when_its_marker_is_there(checkpoint: Path) -> None:
    remote = stored()
    remote.upload([checkpoint / ".metadata", checkpoint / "__0_0.distcp"])
    assert remote.markers() == {"step_00000005": ""}
    remote.commit(checkpoint / MARKER)
    assert remote.markers() == {"step_00000005": MARKER}
    remote.invalidate("step_00000005")
    assert remote.markers() == {"step_00000005": ""}
    remote.remove("step_00000005")
    assert remote.markers() == {}
    assert sorted(path.name for path in checkpoint.iterdir()) == sorted(
        [".metadata", "__0_0.distcp", MARKER]
    )


def test_records_are_there_before_the_marker(
    s3: str, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = "s3://pile/run/stages/pretrain/0/metrics.jsonl"
    local_path(record).write_text("[0, {}]\n")
    with BadLine(s3, faults=[], concerns=lambda *_: False).open(monkeypatch) as line:
        stored(metrics=record).commit(checkpoint / MARKER)
    put = [path.rpartition("/")[2] for method, path in line.requests if method == "PUT"]
    assert put == ["metrics.jsonl", MARKER]


def test_what_is_missing_is_downloaded_and_what_is_damaged_is_left_out(
    checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    remote = stored()
    files = [checkpoint / ".metadata", checkpoint / "__0_0.distcp"]
    remote.upload(files)
    metadata = {"sha256": "0" * 64}
    key = HOME.removeprefix("s3://pile/") + "/step_00000005/.metadata"
    boto3.client("s3").put_object(Bucket="pile", Key=key, Body=b"x", Metadata=metadata)
    shutil.rmtree(checkpoint)
    remote.download([*files, checkpoint / "__1_0.distcp"])
    assert [path.name for path in checkpoint.iterdir()] == ["__0_0.distcp"]
    assert re.search(r"S3 answered 404 for \S*__1_0\.distcp", caplog.text)
    assert ".metadata was damaged on the way" in caplog.text


@pytest.fixture
def job(
    s3: str, stage: TrainStage, dataset: DatasetManifest, context: RunContext, tmp_path: Path
) -> Job:
    """Twelve steps of the fixtures' training, with everything in the bucket."""
    store = f"sqlite:///{context.root / 'mlflow.db'}"
    context = context.model_copy(update={"workdir": "s3://pile/run", "tracking_uri": store})
    shards = local_path("s3://pile/run/shards")
    shutil.copytree(dataset.shards_uri, shards)
    upload(shards, "s3://pile/run/shards")
    short = stage.learning.optimization.model_copy(update={"num_steps": 12})
    checkpoints = stage.learning.checkpoints.model_copy(update={"every_steps": 3})
    learning = stage.learning.model_copy(update={"optimization": short, "checkpoints": checkpoints})
    return Job(
        stage_name="pretrain",
        stage=stage.model_copy(update={"learning": learning}),
        context=context,
        directory="s3://pile/run/stages/pretrain/0",
        shards="s3://pile/run/shards",
        mlflow_run_id=_run(context),
    )


def _run(context: RunContext) -> str:
    from components.runtime.tracking import Tracker

    return Tracker(context).stage("pretrain", key="0").run_id


def start(job: Job) -> subprocess.Popen[bytes]:
    job.write()
    return subprocess.Popen(
        [sys.executable, "-m", "components.train.worker", job.uri], env=os.environ
    )


def test_paths_have_no_remote(job: Job, tmp_path: Path) -> None:
    assert remote_checkpoints_of(job) is not None
    assert remote_checkpoints_of(job.model_copy(update={"directory": str(tmp_path)})) is None


@pytest.mark.slow
def test_a_killed_training_goes_on_from_the_bucket_alone_to_the_same_weights(
    job: Job, s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight = job.model_copy(update={"directory": "s3://pile/run/stages/pretrain/1"})
    assert start(straight).wait(timeout=200) == 0

    def is_upload(method: str, path: str) -> bool:
        return method == "PUT" and path.endswith(".distcp")

    faults = ["drop", "answer 503", "drop"]
    with BadLine(s3, faults=faults, concerns=is_upload).open(monkeypatch) as line:
        worker = start(job)
        deadline = time.monotonic() + 200
        while not exists(f"{job.directory}/checkpoints/step_00000006/{MARKER}"):
            assert worker.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        worker.kill()
        worker.wait()
        assert not line.faults
    shutil.rmtree(cache_directory())
    assert start(job).wait(timeout=200) == 0

    for one in (straight, job):
        steps = {name.partition("/")[0] for name in list_names(f"{one.directory}/checkpoints")}
        assert steps == {"step_00000009", "step_00000012"}
        rows = (read_text(f"{one.directory}/metrics.jsonl") or "").splitlines()
        assert [json.loads(row)[0] for row in rows] == list(range(12))
        assert exists(f"{one.directory}/health/health.html")
    results = [read_result(one) for one in (straight, job)]
    assert results[0] is not None
    assert results[1] is not None
    assert results[0].teacher_sha256 == results[1].teacher_sha256
    there = door.find(f"{job.directory}/teacher.safetensors")
    assert there is not None
    assert there.sha256 == results[1].teacher_sha256 == digest_of_file(job.teacher)


def test_a_training_that_is_asked_to_stop_uploads_its_checkpoint_first(
    job: Job,
) -> None:
    long = job.stage.learning.optimization.model_copy(update={"num_steps": 600})
    learning = job.stage.learning.model_copy(update={"optimization": long})
    job = job.model_copy(update={"stage": job.stage.model_copy(update={"learning": learning})})
    worker = start(job)
    deadline = time.monotonic() + 200
    while not exists(f"{job.directory}/checkpoints/step_00000003/{MARKER}"):
        assert worker.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    worker.send_signal(signal.SIGTERM)
    assert worker.wait(timeout=100) == ExitCode.STOPPED
    result = read_result(job)
    assert result is not None
    assert not result.is_finished
    assert exists(f"{job.directory}/checkpoints/step_{result.step:08d}/{MARKER}")
    rows = (read_text(f"{job.directory}/metrics.jsonl") or "").splitlines()
    assert len(rows) == result.step


def start_nodes(job: Job, folder: Path) -> list[subprocess.Popen[bytes]]:
    """Two nodes of one rank each, with spools of their own."""
    job.write()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    command = [sys.executable, "-m", "components.train.worker", job.uri]
    return [
        subprocess.Popen(
            command,
            env=os.environ | shared | {"RANK": str(n), "DINOPIPE_CACHE": str(folder / f"node{n}")},
        )
        for n in range(2)
    ]


@pytest.mark.slow
def test_nodes_that_share_nothing_but_the_bucket_end_with_the_weights_of_one_machine(
    job: Job, tmp_path: Path
) -> None:
    topology = Topology(processes_per_node=2, threads_per_process=1, loader_threads=1)
    job = job.model_copy(update={"stage": job.stage.model_copy(update={"topology": topology})})
    whole = job.model_copy(
        update={"directory": str(tmp_path / "stage"), "shards": str(local_path(job.shards))}
    )
    assert [node.wait(timeout=300) for node in start_nodes(whole, tmp_path)] == [0, 0]

    nodes = start_nodes(job, tmp_path)
    deadline = time.monotonic() + 300
    while not exists(f"{job.directory}/checkpoints/step_00000006/{MARKER}"):
        assert [node.poll() for node in nodes] == [None, None]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    for node in nodes:
        node.kill()
        node.wait()
    shutil.rmtree(tmp_path / "node1")
    assert [node.wait(timeout=300) for node in start_nodes(job, tmp_path)] == [0, 0]
    kept = list_names(f"{job.directory}/checkpoints/step_00000012")
    assert kept == [".metadata", "__0_0.distcp", "__1_0.distcp", MARKER]
    results = [read_result(one) for one in (whole, job)]
    assert results[0] is not None
    assert results[1] is not None
    assert results[0].teacher_sha256 == results[1].teacher_sha256
