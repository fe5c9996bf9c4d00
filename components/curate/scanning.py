"""Scans all images, in the stage's own process or on ranks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import pyarrow as pa

from components.curate.config import CurateSettings
from components.curate.embedder import embedder_of
from components.curate.job import EmbeddingJob, ImageSet, Role, read_blocks
from components.curate.stored_images import StoredImages
from components.ranks.launcher import run_job
from components.runtime.progress import Reporter
from components.runtime.stage import StageContext
from components.runtime.storage import is_remote, upload
from dinov2_core.curation.scanning import scan_blocks
from k8s.launchers import Processes, TrainJobLaunch

Scans = Mapping[Role, Iterable[pa.Table]]
"""Blocks of `SCAN_SCHEMA` of each set."""


def scan_here(
    sets: Mapping[Role, StoredImages], *, settings: CurateSettings, report: Reporter
) -> Scans:
    """Scan in this process, block by block as the results are read."""
    embedder = embedder_of(settings.embedding)
    return {
        role: scan_blocks(
            files,
            embedder=embedder,
            min_side_pixels=settings.min_side_pixels,
            num_threads=settings.num_threads,
            progress=report,
        )
        for role, files in sets.items()
    }


def scan_on_ranks(
    sets: Mapping[Role, StoredImages],
    *,
    settings: CurateSettings,
    stage: StageContext,
    launch: Processes | TrainJobLaunch,
) -> Scans:
    """Have ranks scan all images, and read their results; finished blocks survive a failure.

    Raises:
        StageFailed: A rank failed or was killed.
        Stopped: The ranks were stopped.
    """
    job = EmbeddingJob(
        context=stage.context,
        directory=stage.uri(stage.directory),
        mlflow_run_id=stage.run.run_id,
        settings=settings,
        sets=tuple(
            ImageSet(
                role=role,
                uris=tuple(_shared(uri, stage) for uri in files.uris),
                num_files=len(files),
            )
            for role, files in sets.items()
        ),
    )
    run_job(job, launch=launch, lock=stage.lock, report=stage.report)
    stage.download(job.scans)
    return {role: read_blocks(job, role, files) for role, files in sets.items()}


def _shared(uri: str, stage: StageContext) -> str:
    """A uri that all nodes can read; images that this stage made are uploaded first."""
    path = Path(uri)
    if is_remote(uri) or not path.is_relative_to(stage.directory):
        return uri
    shared = stage.uri(path)
    upload(path, shared)
    return shared
