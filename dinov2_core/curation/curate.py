"""curate(): from the scans of all files to a manifest of what is worth training on."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import assert_never

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from dinov2_core.config.curation import AlignmentVerification, EmbeddingVerification
from dinov2_core.curation.alignment import find_aligned_copies
from dinov2_core.curation.decisions import Decisions, decide
from dinov2_core.curation.deduplication import Edges, neighbour_edges
from dinov2_core.curation.image_files import Progress, no_progress
from dinov2_core.curation.manifest import EDGE_SCHEMA, MANIFEST_SCHEMA
from dinov2_core.curation.retrieval import retrieve
from dinov2_core.curation.unique_images import UniqueImages, find_unique_images

EDGE_MARGIN = 0.05
"""Edges this far below the lower threshold are saved too."""
MAX_COMPONENT_SHARE, MIN_GIANT_IMAGES = 0.01, 10
"""A component with a larger share and so many unique images is reported: a low threshold joins
distinct images one by one."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Curation:
    """The result."""

    manifest: pa.Table
    """`MANIFEST_SCHEMA`."""
    edges: pa.Table
    """`EDGE_SCHEMA`."""


def curate(
    source: Iterable[pa.Table],
    *,
    evaluation: Iterable[pa.Table] = (),
    seeds: Iterable[pa.Table] | None = None,
    verification: EmbeddingVerification | AlignmentVerification,
    seed_neighbours: int = 4,
    progress: Progress = no_progress,
) -> Curation:
    """Keep one of every set of copies, drop leaks, retrieve by seeds.

    The same files, embedder and settings give the same tables. All images are given as blocks of
    `SCAN_SCHEMA`.

    Args:
        source: Images to select from.
        evaluation: Images of evaluation sets; components with a similar image are dropped.
        seeds: Images of the wanted kind; None keeps every kind.
        verification: Decides what is a copy.
        seed_neighbours: Images retrieved per seed image.
        progress: Reports the search for copies.
    """
    images = find_unique_images(source, evaluation=evaluation)
    edges = _find_edges(images, verification, progress)
    decisions = decide(
        images,
        edges=edges,
        near_threshold=verification.near_threshold,
        leak_threshold=verification.leak_threshold,
        retrieved=None if seeds is None else _retrieve(images, seeds, seed_neighbours),
    )
    largest, number = decisions.largest_component, len(images.is_evaluation)
    if largest >= MIN_GIANT_IMAGES and largest > MAX_COMPONENT_SHARE * number:
        _log.warning(
            "a component holds %d of %d distinct images: near_threshold %s may join images that "
            "are no copies; raise it",
            largest,
            number,
            verification.near_threshold,
        )
    return Curation(manifest=_manifest(images, decisions), edges=_edge_table(images, edges))


def _find_edges(
    images: UniqueImages,
    verification: EmbeddingVerification | AlignmentVerification,
    progress: Progress,
) -> Edges:
    lowest = min(verification.near_threshold, verification.leak_threshold) - EDGE_MARGIN
    match verification:
        case EmbeddingVerification(num_neighbours=number):
            return neighbour_edges(images.embeddings, num_neighbours=number, threshold=lowest)
        case AlignmentVerification(num_proposals=number):
            return find_aligned_copies(
                images.thumbnails,
                proposals=neighbour_edges(images.embeddings, num_neighbours=number, threshold=-1.0),
                candidate_threshold=verification.candidate_threshold,
                edge_threshold=lowest,
                progress=progress,
            )
        case _:
            assert_never(verification)


def _retrieve(
    images: UniqueImages, seeds: Iterable[pa.Table], num_neighbours: int
) -> NDArray[np.int64]:
    """Numbers of the unique images that seeds retrieve, among those of the source."""
    wanted = find_unique_images(seeds, evaluation=())
    of_source = np.unique(images.image_of_file[images.image_of_file >= 0])
    found = retrieve(wanted.embeddings, images.embeddings[of_source], num_neighbours=num_neighbours)
    return of_source[found]


def _manifest(images: UniqueImages, decisions: Decisions) -> pa.Table:
    names = images.files["name"]
    is_unusable = images.image_of_file < 0

    def names_of(numbers: NDArray[np.int64]) -> pa.ChunkedArray:
        return names.take(pa.array(numbers, mask=numbers < 0))

    def known(similarity: NDArray[np.float32]) -> pa.Array:
        return pa.array(similarity, mask=np.isnan(similarity))

    columns = {
        "uri": names,
        **{field: images.files[field] for field in MANIFEST_SCHEMA.names[1:6]},
        "kept": decisions.reasons == "",
        "reason": decisions.reasons.tolist(),
        "component": pa.array(decisions.components, mask=is_unusable),
        "component_size": pa.array(decisions.sizes, mask=is_unusable),
        "representative": names_of(decisions.representatives),
        "nearest": names_of(decisions.nearest),
        "nearest_similarity": known(decisions.nearest_similarity),
        "evaluation_similarity": known(decisions.evaluation_similarity),
    }
    return pa.table(columns, schema=MANIFEST_SCHEMA)


def _edge_table(images: UniqueImages, edges: Edges) -> pa.Table:
    columns = {
        "first": images.pixel_hashes[edges.first].tolist(),
        "second": images.pixel_hashes[edges.second].tolist(),
        "similarity": edges.similarity,
    }
    return pa.table(columns, schema=EDGE_SCHEMA)
