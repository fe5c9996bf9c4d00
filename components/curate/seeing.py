"""What is seen of the images: looked at in the stage's own process, or by ranks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import pyarrow as pa

from components.curate.config import CurateSettings
from components.curate.embedder import embedder_of
from components.curate.job import EmbeddingJob, ImageSet, Role, read_blocks
from components.curate.pile import StoredImages
from components.ranks.launcher import run_job
from components.runtime.progress import Reporter
from components.runtime.stage import StageContext
from components.runtime.storage import is_remote, upload
from dinov2_core.curation.looking import looks
from k8s.launchers import ClusterLaunch, Processes

Seen = Mapping[Role, Iterable[pa.Table]]
"""Blocks of what one look at the images of each set told."""


def seen_here(
    sets: Mapping[Role, StoredImages], *, settings: CurateSettings, report: Reporter
) -> Seen:
    """Look at all images in this process, as curation asks for them."""
    embedder = embedder_of(settings.embedding)
    return {
        role: looks(
            files,
            embedder=embedder,
            min_side_pixels=settings.min_side_pixels,
            num_threads=settings.num_threads,
            progress=report,
        )
        for role, files in sets.items()
    }


def seen_by_ranks(
    sets: Mapping[Role, StoredImages],
    *,
    settings: CurateSettings,
    place: StageContext,
    launch: Processes | ClusterLaunch,
) -> Seen:
    """Let ranks look at all images, and read what they saw.

    Raises:
        StageFailed: A rank failed or was killed; finished blocks stay.
        Stopped: The ranks were stopped; finished blocks stay.
    """
    job = EmbeddingJob(
        context=place.context,
        directory=place.uri(place.directory),
        mlflow_run_id=place.run.run_id,
        settings=settings,
        sets=tuple(
            ImageSet(
                role=role,
                places=tuple(_seen_by_all(uri, place) for uri in files.places),
                num_files=len(files),
            )
            for role, files in sets.items()
        ),
    )
    run_job(job, launch=launch, lock=place.lock, report=place.report)
    place.download(job.looks)
    return {role: read_blocks(job, role, files) for role, files in sets.items()}


def _seen_by_all(uri: str, place: StageContext) -> str:
    """Where all nodes find images; those that this stage made are brought there."""
    path = Path(uri)
    if is_remote(uri) or not path.is_relative_to(place.directory):
        return uri
    shared = place.uri(path)
    upload(path, shared)
    return shared
