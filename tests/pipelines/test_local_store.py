"""Whole runs on this machine whose work directory is in an object store."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest

from tests.pipelines.specs import small_values, write_spec
from tests.s3_server import BUCKET, s3_server

pytestmark = pytest.mark.slow

STAGES = ["curate", "pretrain", "finetune", "evaluate", "register"]


class Store:
    """The bucket and this machine's spool."""

    def __init__(self, spool: Path) -> None:
        self.spool = spool

    def keys(self, prefix: str = "") -> list[str]:
        pages = boto3.client("s3").get_paginator("list_objects_v2").paginate(Bucket=BUCKET)
        found = [entry["Key"] for page in pages for entry in page.get("Contents", [])]
        return [key for key in found if key.startswith(prefix)]

    def json(self, key: str) -> dict[str, Any]:
        body = boto3.client("s3").get_object(Bucket=BUCKET, Key=key)["Body"].read()
        loaded: dict[str, Any] = json.loads(body)
        return loaded

    def manifest(self, prefix: str, stage: str) -> dict[str, Any]:
        (key,) = (k for k in self.keys(f"{prefix}/stages/{stage}/") if k.endswith("/manifest.json"))
        return self.json(key)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    spool = tmp_path_factory.mktemp("node") / "spool"
    with pytest.MonkeyPatch.context() as patch, s3_server(patch, cache_directory=spool):
        yield Store(spool)


@pytest.fixture(scope="module")
def spec(pile: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    values = small_values(pile)
    values["pretrain"]["learning"]["optimization"]["num_steps"] = 60
    values["pretrain"]["learning"]["checkpoints"] = {"every_steps": 5, "keep_last": 2}
    return write_spec(values, tmp_path_factory.mktemp("spec") / "spec.yaml")


def command(spec: Path, prefix: str) -> list[str]:
    place = f"s3://{BUCKET}/{prefix}"
    return [sys.executable, "-m", "pipelines", "run", str(spec), "--workdir", place]


def run(spec: Path, prefix: str) -> str:
    ended = subprocess.run(command(spec, prefix), capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


@pytest.fixture(scope="module")
def straight(store: Store, spec: Path) -> dict[str, Any]:
    """A run from the start to the end."""
    said = run(spec, "straight")
    assert "MLflow's store stays on this machine" in said
    return store.json("straight/run.json")


def test_everything_that_matters_is_in_the_bucket(store: Store, straight: dict[str, Any]) -> None:
    assert straight["status"] == "succeeded"
    assert list(straight["stages"]) == STAGES
    keys = store.keys("straight/")
    for stage in STAGES:
        assert straight["stages"][stage]["manifest"].startswith("s3://pile/straight/stages/")
        assert (
            store.json(f"straight/progress/{straight['run_id']}/{stage}.json")["state"]
            == "succeeded"
        )
    for ending in (
        "/shards/index.parquet", "/shards/shard-00000.tar", "/images.parquet", "/metrics.jsonl",
        "/health/health.html", "/result.json", "/checkpoints/step_00000060/complete.json",
        "/checkpoints/step_00000055/.metadata", ".log",
    ):  # fmt: skip
        assert [key for key in keys if key.endswith(ending)], ending
    assert not [
        key for key in keys if "step_00000050" in key or key.endswith(("lease.json", "/lock"))
    ]
    places = [
        store.manifest("straight", "curate")["shards_uri"],
        *store.manifest("straight", "evaluate")["pictures"],
    ]
    assert all(place.startswith("s3://pile/straight/") for place in places)


def test_a_second_run_with_an_empty_spool_takes_over_what_is_finished(
    store: Store, spec: Path, straight: dict[str, Any]
) -> None:
    shutil.rmtree(store.spool)
    run(spec, "straight")
    again = store.json("straight/run.json")["stages"]
    assert {name for name, stage in again.items() if stage["cached"]} == set(STAGES) - {"register"}


def test_a_killed_run_goes_on_from_the_bucket_alone_and_ends_with_the_same_teacher(
    store: Store, spec: Path, straight: dict[str, Any]
) -> None:
    process = subprocess.Popen(command(spec, "killed"), start_new_session=True)
    deadline = time.monotonic() + 600
    while not any(k.endswith("step_00000015/complete.json") for k in store.keys("killed/")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.2)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    time.sleep(5)  # the ranks die with their parents
    shutil.rmtree(store.spool)
    said = run(spec, "killed")
    assert "/checkpoints/step_000000" in said
    assert "resuming" in said
    resumed, whole = (store.manifest(name, "pretrain") for name in ("killed", "straight"))
    assert resumed["sha256"] == whole["sha256"]
    (metrics,) = (k for k in store.keys("killed/stages/pretrain/") if k.endswith("/metrics.jsonl"))
    body = boto3.client("s3").get_object(Bucket=BUCKET, Key=metrics)["Body"].read().decode()
    assert [json.loads(line)[0] for line in body.splitlines()] == list(range(60))
