"""scanning: ranks find what one process finds, and curation decides the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from components.curate.config import CurateSettings, TorchScriptEmbedding
from components.curate.job import Role
from components.curate.scanning import scan_here, scan_on_ranks
from components.curate.stored_images import StoredImages
from components.ranks.config import Topology
from components.runtime.context import RunContext
from components.runtime.processes import exclusive_directory
from components.runtime.progress import Reporter
from components.runtime.stage import StageContext
from components.runtime.tracking import Tracker
from dinov2_core.config.curation import AlignmentVerification
from dinov2_core.curation.curate import curate
from dinov2_core.curation.scanning import BLOCK_FILES
from k8s.launchers import Processes


@pytest.fixture
def settings(tmp_path: Path) -> CurateSettings:
    """A small network, so that vectors come out of sums over a batch."""
    torch.manual_seed(0)
    network = torch.nn.Sequential(
        torch.nn.Conv2d(3, 32, 4, stride=4),
        torch.nn.GELU(),
        torch.nn.Conv2d(32, 16, 3),
    )
    path = tmp_path / "network.pt"
    torch.jit.script(network).save(path)  # type: ignore[no-untyped-call]
    return CurateSettings(
        min_side_pixels=8,
        embedding=TorchScriptEmbedding(path=str(path), size_pixels=32),
        embedding_topology=Topology(processes_per_node=2, threads_per_process=1, loader_threads=1),
    )


@pytest.fixture
def sets(tmp_path: Path) -> dict[Role, StoredImages]:
    """Two blocks of source images, and an evaluation set and seeds that share images with them."""
    rng = np.random.default_rng(0)
    images = [
        Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)).resize((24, 24))
        for _ in range(BLOCK_FILES + 20)
    ]
    folders: dict[Role, list[int]] = {
        "source": list(range(BLOCK_FILES + 10)),
        "evaluation": list(range(BLOCK_FILES, BLOCK_FILES + 20)),
        "seeds": list(range(5)),
    }
    found: dict[Role, StoredImages] = {}
    for role, numbers in folders.items():
        folder = tmp_path / role
        folder.mkdir()
        for number in numbers:
            images[number].save(folder / f"{number:04d}.png")
        found[role] = StoredImages([str(folder)])
    return found


def test_ranks_find_what_one_process_finds(
    settings: CurateSettings,
    sets: dict[Role, StoredImages],
    context: RunContext,
) -> None:
    report = Reporter(None, stage="curate")
    alone = {
        role: list(blocks)
        for role, blocks in scan_here(sets, settings=settings, report=report).items()
    }
    directory = context.stage_directory("curate", "k")
    with exclusive_directory(directory) as lock:
        stage = StageContext(
            directory=directory,
            lock=lock,
            run=Tracker(context).stage("curate", key="k"),
            report=report,
            config_sha256="",
            parents=(),
            context=context,
        )
        shared = {
            role: list(blocks)
            for role, blocks in scan_on_ranks(
                sets, settings=settings, stage=stage, launch=Processes()
            ).items()
        }
    for role, blocks in alone.items():
        for one, other in zip(blocks, shared[role], strict=True):
            assert_same_scans(one, other)
    made = [
        curate(
            scans["source"],
            evaluation=scans["evaluation"],
            seeds=scans["seeds"],
            verification=AlignmentVerification(),
        )
        for scans in (alone, shared)
    ]
    assert made[0].manifest.equals(made[1].manifest)
    reasons = set(made[0].manifest["reason"].to_pylist())
    assert {"", "evaluation_leak", "not_retrieved"} <= reasons


def assert_same_scans(one: pa.Table, other: pa.Table) -> None:
    assert one.drop_columns(["embedding"]).equals(other.drop_columns(["embedding"]))
    vectors = [table["embedding"].combine_chunks().flatten().to_numpy() for table in (one, other)]
    np.testing.assert_allclose(vectors[0], vectors[1], rtol=0, atol=1e-6)
