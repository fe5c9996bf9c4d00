from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Literal

import pytest
import yaml

from dinov2_core.config.training import TrainingConfig
from dinov2_core.errors import SettingsError
from dinov2_core.planning.step import StepCost, trace_step
from pipelines.plan.hardware import PROFILES, load_hardware, step_time
from tests.dinov2_core.planning.configs import small_config
from tests.pipelines.specs import REPOSITORY

COST = StepCost(
    peak_bytes=0,
    memory_bytes={},
    flops={"bfloat16": 4 * 10**13, "float32": 10**12},
    moved_bytes=3 * 10**11,
    sent_bytes={"all_gather": 4 * 10**9, "reduce_scatter": 2 * 10**9, "all_reduce": 10**7},
    calls={},
)


@pytest.mark.parametrize("name", ["a100-80", "h100", "h200", "cpu"])
def test_every_profile_is_right(name: str) -> None:
    assert load_hardware(name).memory_gib > load_hardware(name).reserved_gib


def test_a_profile_can_be_edited(tmp_path: Path) -> None:
    values = yaml.safe_load(PROFILES.read_text())["h100"]
    file = tmp_path / "own.yaml"
    file.write_text(yaml.safe_dump({"mine": values | {"memory_gib": 94.0}}))
    assert load_hardware(str(file)).memory_gib == 94.0
    file.write_text(yaml.safe_dump({"a": values, "b": values | {"memory_gib": 40.0}}))
    assert load_hardware(f"{file}:b").memory_gib == 40.0
    with pytest.raises(SettingsError, match=f"choose {file}:a or {file}:b"):
        load_hardware(str(file))


def test_a_wrong_profile_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="neither a profile nor a file; choose one of a100-80"):
        load_hardware("h1000")
    file = tmp_path / "own.yaml"
    file.write_text("mine: {memory_gib: much}")
    with pytest.raises(SettingsError, match="is not a hardware profile"):
        load_hardware(str(file))


def test_one_rank_waits_for_nobody() -> None:
    hardware = load_hardware("a100-80")
    time = step_time(COST, hardware, world_size=1)
    assert time.communication == time.exposed == 0
    by_hand = (4e13 / 312e12 + 1e12 / 19.5e12) / hardware.compute_fraction
    assert time.compute == pytest.approx(by_hand)
    assert time.memory == pytest.approx(3e11 / (2.039e12 * hardware.memory_fraction))


def test_rings_move_all_but_a_ranks_own_part_through_every_card_of_a_node() -> None:
    hardware = load_hardware("a100-80").model_copy(update={"overlap": 0.0})
    inside = step_time(COST, hardware, world_size=8).exposed
    assert inside == pytest.approx((6e9 + 2 * 1e7) * 7 / 8 / 230e9)
    between = step_time(COST, hardware, world_size=16).exposed
    assert between == pytest.approx((6e9 / (8 * 20e9) + 2 * 1e7 / 20e9) * 15 / 16)
    replicas = step_time(COST, hardware, world_size=16, num_replicas=2).exposed
    assert replicas == pytest.approx(6e9 * 7 / 8 / 230e9 + 2 * 1e7 * 15 / 16 / 20e9)
    wide = hardware.model_copy(update={"inter_node_gigabytes_per_second": 100.0})
    capped = step_time(COST, wide, world_size=16).exposed
    assert capped == pytest.approx((6e9 / 230e9 + 2 * 1e7 / 100e9) * 15 / 16)


def test_gathers_hide_behind_computing() -> None:
    hardware = load_hardware("a100-80")
    time = step_time(COST, hardware, world_size=8)
    assert 0 < time.exposed < time.communication
    assert time.total == time.compute + time.memory + time.exposed


def timed(config: TrainingConfig, *, world_size: int, folder: Path) -> dict[str, float]:
    """Steps of gloo ranks on this machine, one thread each."""
    settings = folder / "config.json"
    settings.write_text(config.model_dump_json())
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    address = {"WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = [
        subprocess.Popen(
            [
                sys.executable,
                "-W",
                "ignore",
                "-m",
                "tests.dinov2_core.planning.timed_ranks",
                settings,
            ],
            cwd=REPOSITORY,
            env=os.environ | address | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(world_size)
    ]
    outputs = [rank.communicate(timeout=240)[0] for rank in ranks]
    result: dict[str, float] = json.loads(outputs[0].splitlines()[-1])
    return result


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_two_ranks_take_the_time_that_follows_from_one(
    precision: Literal["fp32", "bf16"], tmp_path: Path
) -> None:
    """One rank sets how fast work is done, a gather and a tiny reduction how fast the network is;
    the step of two ranks follows. Within half: other processes share the cores."""
    config = small_config(precision=precision)
    one = timed(config, world_size=1, folder=tmp_path)
    two = timed(config, world_size=2, folder=tmp_path)
    costs = {world: trace_step(config, world_size=world, kind="cpu") for world in (1, 2)}
    profile = load_hardware("cpu")
    work = step_time(costs[1], profile, world_size=1)
    speed = one["step_seconds"] / work.total
    network = {
        "intra_node_gigabytes_per_second": two["bytes_per_second"] / 1e9,
        "latency_microseconds": two["latency_seconds"] * 1e6,
    }
    split = step_time(costs[2], profile.model_copy(update=network), world_size=2)
    planned = speed * (split.compute + split.memory) + split.exposed
    assert planned == pytest.approx(two["step_seconds"], rel=0.5)
