"""curate(): from a pile of files to a manifest of what is worth training on."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import assert_never

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from dinov2_core.curation.collecting import CollectedImages, collect
from dinov2_core.curation.decisions import Decisions, decide
from dinov2_core.curation.deduplication import ComponentSizes, Edges, neighbour_edges
from dinov2_core.curation.manifest import (
    EDGE_SCHEMA,
    MANIFEST_SCHEMA,
    ReasonCount,
    count_reasons,
)
from dinov2_core.curation.registration import register_copies
from dinov2_core.curation.retrieval import Retrieval, retrieve
from dinov2_core.curation.sources import Progress, no_progress

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddingOnly:
    """Two images are copies if their embeddings are; for embedders made for that, such as SSCD."""

    near_threshold: float = 0.6
    """Cosine of near copies; arXiv:2304.07193 with SSCD. Belongs to an embedder and a domain."""
    leak_threshold: float = 0.45
    """Cosine to an evaluation image; arXiv:2304.07193 with SSCD."""
    num_neighbours: int = 64
    """Nearest neighbours asked per image, arXiv:2304.07193."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Registration:
    """Two images are copies if one, cropped by up to 15 % of a side, lies on the other.

    Embeddings and an index of crops propose pairs, alignment decides; see `registration`. Defaults
    were measured with planted copies in 10,000 images of Fashion-MNIST, whose distinct images are
    unusually alike. Mirrored and rotated copies are not looked for.
    """

    candidate_threshold: float = 0.85
    """Whitened cosine before alignment; all but 1 in 150 crops lay above."""
    near_threshold: float = 0.98
    """Whitened cosine of near copies. Above lay all JPEG and WebP copies of quality 60 to 95, 99 %
    of crops that leave 85 to 96 % of each side, 97 % of copies resized to 75 to 200 %; it cost
    0.3 to 0.4 % of the distinct images. 0.97 finds 1 % more and costs 1.1 %."""
    leak_threshold: float = 0.97
    """Whitened cosine to an evaluation image, lower because a leak costs more than an image."""
    num_proposals: int = 4
    """Nearest neighbours by the embedder that are judged besides those of the index of crops."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CurationSettings:
    """What decides over keeping and dropping."""

    verification: EmbeddingOnly | Registration
    """Who has the last word on a pair."""
    edge_margin: float = 0.05
    """Edges this far below the lower threshold are written down too."""
    seed_neighbours: int = 4
    """Images retrieved per seed image, arXiv:2304.07193 for large seed sets."""
    max_component_share: float = 0.01
    """Share of the pile above which a component is reported as a giant."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Curation:
    """What came out."""

    manifest: pa.Table
    """`MANIFEST_SCHEMA`."""
    edges: pa.Table
    """`EDGE_SCHEMA`."""
    counts: tuple[ReasonCount, ...]
    """Adds up to the files of the pile."""
    components: ComponentSizes
    """Of the sound images of the pile."""
    retrieval: Retrieval | None
    """None without seeds."""


def curate(
    pile: Iterable[pa.Table],
    *,
    evaluation: Iterable[pa.Table] = (),
    seeds: Iterable[pa.Table] | None = None,
    settings: CurationSettings,
    progress: Progress = no_progress,
) -> Curation:
    """Refuse what is no image, keep one of every set of copies, drop leaks, retrieve by seeds.

    The same files, embedder and settings give the same tables. All images are given as blocks of
    what one look at them told, see `looking`.

    Args:
        pile: What was collected.
        evaluation: Images of evaluation sets; what is like them is dropped with its component.
        seeds: Images of the wanted kind; None keeps every kind.
        settings: Thresholds and limits.
        progress: Told about every stage.
    """
    collected = collect(pile, evaluation=evaluation)
    edges = _find_edges(collected, settings, progress)
    retrieval = None
    if seeds is not None:
        retrieval = _retrieve(collected, seeds, num_neighbours=settings.seed_neighbours)
    decisions = decide(
        collected,
        edges=edges,
        near_threshold=settings.verification.near_threshold,
        leak_threshold=settings.verification.leak_threshold,
        max_component_share=settings.max_component_share,
        retrieved=None if retrieval is None else retrieval.pile_indices,
    )
    manifest = _manifest(collected, decisions)
    counts = count_reasons(manifest)
    if decisions.component_sizes.is_giant:
        _log.warning(
            "a component holds %d of %d files: the threshold %s chains distinct images; raise it",
            decisions.component_sizes.largest,
            len(collected.pile),
            settings.verification.near_threshold,
        )
    return Curation(
        manifest=manifest,
        edges=_edge_table(collected, edges),
        counts=counts,
        components=decisions.component_sizes,
        retrieval=retrieval,
    )


def _find_edges(
    collected: CollectedImages, settings: CurationSettings, progress: Progress
) -> Edges:
    verification = settings.verification
    lowest = min(verification.near_threshold, verification.leak_threshold) - settings.edge_margin
    match verification:
        case EmbeddingOnly():
            return neighbour_edges(
                collected.embeddings, num_neighbours=verification.num_neighbours, threshold=lowest
            )
        case Registration():
            proposals = neighbour_edges(
                collected.embeddings,
                num_neighbours=verification.num_proposals,
                threshold=-1.0,
            )
            return register_copies(
                collected.thumbnails,
                proposals=proposals,
                candidate_threshold=verification.candidate_threshold,
                edge_threshold=lowest,
                progress=progress,
            )
        case _:
            assert_never(verification)


def _retrieve(
    collected: CollectedImages, seeds: Iterable[pa.Table], *, num_neighbours: int
) -> Retrieval:
    wanted = collect(seeds, evaluation=())
    in_pile = np.unique(collected.pile_pictures[collected.pile_pictures >= 0])
    found = retrieve(
        wanted.embeddings, collected.embeddings[in_pile], num_neighbours=num_neighbours
    )
    return Retrieval(
        pile_indices=in_pile[found.pile_indices],
        num_raw=found.num_raw,
        num_unique=found.num_unique,
    )


def _manifest(collected: CollectedImages, decisions: Decisions) -> pa.Table:
    files = collected.pile
    names = [file.name for file in files]

    def name_of(numbers: NDArray[np.int64]) -> list[str | None]:
        return [names[number] if number >= 0 else None for number in numbers.tolist()]

    sound = collected.pile_pictures >= 0
    columns = {
        "uri": names,
        "sha256": [file.sha256 for file in files],
        "size_bytes": [file.size_bytes for file in files],
        "width": [file.width for file in files],
        "height": [file.height for file in files],
        "format": [file.format for file in files],
        "kept": decisions.reasons == "",
        "reason": decisions.reasons.tolist(),
        "component": pa.array(decisions.components, mask=~sound),
        "component_size": pa.array(decisions.sizes, mask=~sound),
        "representative": name_of(decisions.representatives),
        "nearest": name_of(decisions.nearest),
        "nearest_similarity": pa.array(
            decisions.nearest_similarity, mask=np.isnan(decisions.nearest_similarity)
        ),
        "evaluation_similarity": pa.array(
            decisions.evaluation_similarity, mask=np.isnan(decisions.evaluation_similarity)
        ),
    }
    return pa.table(columns, schema=MANIFEST_SCHEMA)


def _edge_table(collected: CollectedImages, edges: Edges) -> pa.Table:
    hashes = np.array(collected.picture_hashes, dtype=np.str_)
    columns = {
        "first": hashes[edges.first].tolist(),
        "second": hashes[edges.second].tolist(),
        "similarity": edges.similarity,
    }
    return pa.table(columns, schema=EDGE_SCHEMA)
