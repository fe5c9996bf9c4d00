"""From edges to outcomes: which source file is kept, and why the others are not."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from dinov2_core.curation.deduplication import (
    Edges,
    choose_representatives,
    label_components,
    number_in_order,
)
from dinov2_core.curation.manifest import Reason
from dinov2_core.curation.unique_images import UniqueImages


@dataclass(frozen=True, slots=True, kw_only=True)
class Decisions:
    """Outcome of every source file [F]; -1 or NaN where there is none."""

    reasons: NDArray[np.str_]
    """Empty for kept."""
    components: NDArray[np.int64]
    """Numbered in the order of the files."""
    sizes: NDArray[np.int64]
    """Files in the component."""
    representatives: NDArray[np.int64]
    """File that is kept of the component."""
    nearest: NDArray[np.int64]
    """Most similar other source file."""
    nearest_similarity: NDArray[np.float32]
    evaluation_similarity: NDArray[np.float32]
    largest_component: int
    """Unique images in it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Usable:
    """Usable files, S of them, and the components of their images."""

    files: NDArray[np.int64]
    """[S]."""
    images: NDArray[np.int64]
    """Unique image [S]."""
    components: NDArray[np.int64]
    """[S]."""
    representatives: NDArray[np.int64]
    """Index into the usable files, by component [C]."""
    is_best: NDArray[np.bool_]
    """Whether the file is the best of those with its pixels [S]."""


def decide(
    images: UniqueImages,
    *,
    edges: Edges,
    near_threshold: float,
    leak_threshold: float,
    retrieved: NDArray[np.int64] | None,
) -> Decisions:
    """Drop unusable files, components with an evaluation image, copies, and what no seed retrieved.

    Args:
        images: Source files and unique images.
        edges: Between unique images.
        near_threshold: Similarity that joins source images to components.
        leak_threshold: Similarity to an evaluation image from which a component is dropped.
        retrieved: Unique images that a seed retrieved; None without seeds.
    """
    usable = _group(images, edges.at_least(near_threshold))
    similarity = _similarity_to_evaluation(images, edges)
    reasons = np.array(images.files["reason"].to_pylist(), dtype="<U32")
    reasons[usable.files] = _reasons(
        usable,
        is_leak=similarity >= np.float32(leak_threshold),
        retrieved=retrieved,
    )
    nearest, nearest_similarity = _nearest_files(images, edges, usable)

    def for_files(values: NDArray[np.int64]) -> NDArray[np.int64]:
        spread = np.full(len(reasons), -1, dtype=np.int64)
        spread[usable.files] = values
        return spread

    evaluation_similarity = np.full(len(reasons), np.nan, dtype=np.float32)
    evaluation_similarity[usable.files] = similarity[usable.images]
    sizes = np.bincount(usable.components, minlength=1)
    return Decisions(
        reasons=reasons,
        components=for_files(usable.components),
        sizes=for_files(sizes[usable.components]),
        representatives=for_files(usable.files[usable.representatives[usable.components]]),
        nearest=nearest,
        nearest_similarity=nearest_similarity,
        evaluation_similarity=evaluation_similarity,
        largest_component=int(np.bincount(usable.components[usable.is_best], minlength=1).max()),
    )


def _group(images: UniqueImages, near: Edges) -> _Usable:
    number = len(images.is_evaluation)
    usable = np.flatnonzero(images.image_of_file >= 0)
    image_of_file = images.image_of_file[usable]
    is_source = np.zeros(number, dtype=np.bool_)
    is_source[image_of_file] = True
    components = number_in_order(label_components(number, near.within(is_source))[image_of_file])
    files: dict[str, list[int]] = images.files.take(pa.array(usable)).to_pydict()
    quality = {
        "areas": np.array(files["width"], np.int64) * np.array(files["height"], np.int64),
        "sizes_bytes": np.array(files["size_bytes"], np.int64),
    }
    ids = [f"{sha256} {name}" for sha256, name in zip(files["sha256"], files["name"], strict=True)]
    names = np.array(ids, dtype=np.str_)
    is_best = np.zeros(len(usable), dtype=np.bool_)
    is_best[choose_representatives(image_of_file, names=names, **quality)] = True
    return _Usable(
        files=usable,
        images=image_of_file,
        components=components,
        representatives=choose_representatives(components, names=names, **quality),
        is_best=is_best,
    )


def _similarity_to_evaluation(images: UniqueImages, edges: Edges) -> NDArray[np.float32]:
    """To the nearest evaluation image, 1 for one itself, NaN if unknown [U]."""
    similarity = np.full(len(images.is_evaluation), -np.inf, dtype=np.float32)
    for here, there in ((edges.first, edges.second), (edges.second, edges.first)):
        leaks = images.is_evaluation[there]
        np.maximum.at(similarity, here[leaks], edges.similarity[leaks])
    similarity[images.is_evaluation] = 1
    return np.where(np.isinf(similarity), np.float32(np.nan), similarity)


def _reasons(
    usable: _Usable, *, is_leak: NDArray[np.bool_], retrieved: NDArray[np.int64] | None
) -> NDArray[np.str_]:
    reasons = np.full(len(usable.files), Reason.NEAR_COPY.value, dtype="<U32")
    reasons[~usable.is_best] = Reason.EXACT_COPY
    reasons[usable.representatives] = ""
    if retrieved is not None:
        # A copy that is retrieved keeps the representative of its component.
        kept = np.unique(usable.components[np.isin(usable.images, retrieved)])
        is_dropped = ~np.isin(usable.components, kept) & (reasons == "")
        reasons[is_dropped] = Reason.NOT_RETRIEVED
    leaked = np.unique(usable.components[is_leak[usable.images]])
    reasons[np.isin(usable.components, leaked)] = Reason.EVALUATION_LEAK
    return reasons


def _nearest_files(
    images: UniqueImages, edges: Edges, usable: _Usable
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Most similar other file of every file and the similarity; equal pixels count as 1."""
    number = len(images.is_evaluation)
    best_file = np.full(number, -1, dtype=np.int64)
    best_file[usable.images[usable.is_best]] = usable.files[usable.is_best]
    among = edges.within(best_file >= 0)
    here = np.concatenate([among.first, among.second])
    there = np.concatenate([among.second, among.first])
    similarity = np.concatenate([among.similarity, among.similarity])
    order = np.lexsort((there, -similarity, here))
    with_edge, first = np.unique(here[order], return_index=True)
    nearest_file = np.full(number, -1, dtype=np.int64)
    nearest_file[with_edge] = best_file[there[order][first]]
    image_similarity = np.full(number, np.nan, dtype=np.float32)
    image_similarity[with_edge] = similarity[order][first]
    nearest = np.full(len(images.image_of_file), -1, dtype=np.int64)
    nearest_similarity = np.full(len(nearest), np.nan, dtype=np.float32)
    nearest[usable.files] = nearest_file[usable.images]
    nearest_similarity[usable.files] = image_similarity[usable.images]
    # Files with equal pixels are each other's nearest: each has the next one, the last the first.
    order = np.argsort(usable.images, kind="stable")
    for equal in np.split(order, np.flatnonzero(np.diff(usable.images[order])) + 1):
        if len(equal) > 1:
            nearest[usable.files[equal]] = usable.files[np.roll(equal, -1)]
            nearest_similarity[usable.files[equal]] = 1
    return nearest, nearest_similarity
