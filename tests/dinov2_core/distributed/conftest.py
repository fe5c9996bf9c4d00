"""Fixtures: ranks as real processes, and a directory of small images."""

from __future__ import annotations

import io
import os
import runpy
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dinov2_core.data.shards import ShardWriter

SCENARIOS = Path(__file__).with_name("scenarios.py")

RunRanks = Callable[..., list[int]]


@pytest.fixture(scope="session")
def run_ranks() -> RunRanks:
    def run(
        scenario: str,
        *paths: Path,
        world_size: int,
        is_separate: bool = False,
        timeout_seconds: float = 120,
    ) -> list[int]:
        if world_size == 1 and not is_separate:
            names = runpy.run_path(str(SCENARIOS))
            with names["process_group"]() as ranks:
                names[scenario](ranks, *paths)
            return [0]
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        processes = []
        for rank in range(world_size):
            environment = {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(world_size),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
                "OMP_NUM_THREADS": "1",
            }
            command = [sys.executable, "-W", "ignore", str(SCENARIOS), scenario, *map(str, paths)]
            processes.append(subprocess.Popen(command, env=os.environ | environment))
        return [process.wait(timeout=timeout_seconds) for process in processes]

    return run


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("shards")
    rng = np.random.default_rng(0)
    with ShardWriter(directory, target_size_bytes=4000) as writer:
        for _ in range(24):
            buffer = io.BytesIO()
            Image.fromarray(rng.integers(0, 256, (20, 20, 3), dtype=np.uint8)).save(buffer, "PNG")
            writer.add(buffer.getvalue(), extension="png", width=20, height=20)
    return directory
