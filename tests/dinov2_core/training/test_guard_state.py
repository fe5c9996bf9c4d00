"""guard_state: all ranks skip together, nothing is touched, and the fault is found."""

from __future__ import annotations

import io
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dinov2_core.config.guards import CollapseWatch, Guards
from dinov2_core.data.sampler import ImageOrder, rank_positions
from dinov2_core.data.shards import ShardReader, ShardWriter
from dinov2_core.errors import NonFiniteLoss
from dinov2_core.training.guard_state import (
    Diagnosis,
    GuardState,
    collapse_warnings,
)
from dinov2_core.training.schedules import StepSchedule
from dinov2_core.training.step_report import NonFiniteNumber

SCRIPT = Path(__file__).with_name("two_ranks.py")
SCHEDULE = StepSchedule(
    learning_rate=0.4,
    prototype_learning_rate=0.2,
    weight_decay=0.04,
    teacher_momentum=0.99,
    teacher_temperature=0.05,
)


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Two ranks, one of which sees an infinite pixel at step 2."""
    folder = tmp_path_factory.mktemp("ranks")
    rng = np.random.default_rng(0)
    with ShardWriter(folder / "shards", target_size_bytes=4000) as writer:
        for _ in range(16):
            buffer = io.BytesIO()
            Image.fromarray(rng.integers(0, 256, (20, 20, 3), dtype=np.uint8)).save(buffer, "PNG")
            writer.add(buffer.getvalue(), extension="png", width=20, height=20)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    command = [sys.executable, "-W", "ignore", str(SCRIPT), str(folder / "shards"), str(folder)]
    processes = [
        subprocess.Popen(
            command,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ
            | {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": "2",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
                "OMP_NUM_THREADS": "1",
            },
        )
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=100)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
    ranks = [torch.load(folder / f"rank_{rank}.pt") for rank in range(2)]
    return {"ranks": ranks, "log": errors[0], "shards": folder / "shards"}


KINDS = ["FaultyRun", "DeferredFaultyRun"]


@pytest.mark.parametrize("kind", KINDS)
def test_both_ranks_skip_and_nothing_changes(outcome: dict[str, Any], kind: str) -> None:
    for rank in outcome["ranks"]:
        result = rank[kind]
        assert [g["is_skipped"] for g in result["guards"]] == [False, False, True, False]
        assert result["guards"] == outcome["ranks"][0][kind]["guards"]
        assert result["changed"] == []
        assert all(value.isfinite().all() for value in result["state"].values())
        assert "nan" not in result["losses"][-1]
        names = result["state"].keys()
        assert {"model.dino_targets.center", "model.ibot_targets.pending"} <= names
        assert any(name.endswith("exp_avg_sq") for name in names)


def test_the_device_decides_as_the_host_does(outcome: dict[str, Any]) -> None:
    for rank in outcome["ranks"]:
        host, device = (rank[kind] for kind in KINDS)
        assert host["losses"] == device["losses"]
        assert host["guards"] == device["guards"]
        assert host["state"].keys() == device["state"].keys()
        for name, value in host["state"].items():
            assert torch.equal(value, device["state"][name]), name


def test_the_fault_is_traced_to_the_rank_and_its_images(outcome: dict[str, Any]) -> None:
    with ShardReader(outcome["shards"]) as reader:
        order = ImageOrder(num_images=16, seed=0)
        names = [
            [
                reader.entry(int(number)).sha256
                for number in order.image_at(
                    rank_positions(step=2, global_batch_size=8, rank=rank, world_size=2)
                )
            ]
            for rank in range(2)
        ]
    log = outcome["log"]
    assert "skipped: step 2: " in log
    assert "pixels of the crops are not finite on rank 1" in log
    assert f"images of rank 1: {', '.join(names[1])}" in log
    assert not any(name in log for name in names[0])


def test_a_rollback_lowers_the_learning_rate_once_more_each_time() -> None:
    guards = GuardState(Guards(rollback_learning_rate_factor=0.5))
    assert guards.lowered(SCHEDULE) == SCHEDULE
    for expected in (0.2, 0.1):
        guards.record.copy_(guards.after_rollback())
        assert guards.lowered(SCHEDULE).learning_rate == pytest.approx(expected)
        assert guards.lowered(SCHEDULE).prototype_learning_rate == pytest.approx(expected / 2)
    assert guards.num_rollbacks == 2


def test_only_steps_in_a_row_count() -> None:
    guards = GuardState(Guards(max_consecutive_skips=1))
    for is_skipped, must_roll_back in ((True, False), (False, False), (True, False), (True, True)):
        report = guards.count(is_skipped=is_skipped)
        assert guards.must_roll_back is must_roll_back
    assert report.num_skipped == 3


def test_a_diagnosis_is_raised_when_no_rollback_is_left() -> None:
    guards = GuardState(Guards(max_consecutive_skips=0, max_rollbacks=0))
    diagnosis = Diagnosis(
        step=7,
        numbers=(NonFiniteNumber(name="koleo", value=float("inf"), rank=1),),
        findings=("weights are not finite on ranks 0, 1",),
        images={1: tuple(f"sha{i}" for i in range(10))},
    )
    guards.raise_if_exhausted(diagnosis)
    guards.count(is_skipped=True)
    with pytest.raises(NonFiniteLoss) as raised:
        guards.raise_if_exhausted(diagnosis)
    assert str(raised.value).startswith(
        "step 7: koleo is inf on rank 1; weights are not finite on ranks 0, 1; images of rank 1: "
        "sha0, sha1, sha2, sha3, sha4, sha5, sha6, sha7 and 2 more; steps in a row"
    )
    assert raised.value.diagnosis is diagnosis


@pytest.mark.parametrize(
    ("indicators", "sentence"),
    [
        ({"effective_rank": 1.2}, "effective_rank 1.2 is less than 2 (guards.collapse.min_eff"),
        ({"teacher_entropy": 0.001}, "teacher_entropy 0.001 is less than 0.01 (guards.coll"),
        ({"teacher_entropy": 6.931}, "teacher_entropy 6.931 is more than 6.925 (guards.coll"),
        ({"prototype_usage": 0.001}, "prototype_usage 0.001 is less than 0.01 (guards.coll"),
    ],
)
def test_a_crossed_threshold_is_named(indicators: dict[str, float], sentence: str) -> None:
    watch = CollapseWatch(grace_steps=5)
    (warning,) = collapse_warnings(watch, step=5, num_prototypes=1024, indicators=indicators)
    assert warning.startswith(sentence)
    assert not collapse_warnings(watch, step=4, num_prototypes=1024, indicators=indicators)


def test_healthy_indicators_are_silent() -> None:
    healthy = {"effective_rank": 40.0, "teacher_entropy": 3.0, "prototype_usage": 0.9}
    watch = CollapseWatch(grace_steps=0)
    assert not collapse_warnings(watch, step=1, num_prototypes=1024, indicators=healthy)
