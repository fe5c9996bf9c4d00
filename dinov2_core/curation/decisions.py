"""From edges to fates: which file of the pile stays and why the others go."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dinov2_core.curation.collecting import CollectedImages
from dinov2_core.curation.deduplication import (
    ComponentSizes,
    Edges,
    choose_representatives,
    component_sizes,
    label_components,
)
from dinov2_core.curation.manifest import Removal


@dataclass(frozen=True, slots=True, kw_only=True)
class Decisions:
    """Fate of every file of the pile [F]; -1 or NaN where there is nothing to say."""

    reasons: NDArray[np.str_]
    """Empty for kept."""
    components: NDArray[np.int64]
    """Numbered in the order of the files."""
    sizes: NDArray[np.int64]
    """Files in the component."""
    representatives: NDArray[np.int64]
    """File that stands for the component."""
    nearest: NDArray[np.int64]
    """Most similar other file of the pile."""
    nearest_similarity: NDArray[np.float32]
    evaluation_similarity: NDArray[np.float32]
    component_sizes: ComponentSizes


@dataclass(frozen=True, slots=True, kw_only=True)
class _Groups:
    """Components of the sound files."""

    sound: NDArray[np.int64]
    """File numbers [S]."""
    pictures: NDArray[np.int64]
    """[S]."""
    components: NDArray[np.int64]
    """[S]."""
    representatives: NDArray[np.int64]
    """Index into the sound files, by component [C]."""
    best_of_picture: NDArray[np.bool_]
    """Whether the file is the best of those with its pixels [S]."""


def decide(
    collected: CollectedImages,
    *,
    edges: Edges,
    near_threshold: float,
    leak_threshold: float,
    max_component_share: float,
    retrieved: NDArray[np.int64] | None,
) -> Decisions:
    """Drop refused files, whole components that touch an evaluation image, copies, then the rest.

    Args:
        collected: Files and pictures.
        edges: Between pictures.
        near_threshold: Similarity that joins pictures of the pile to components.
        leak_threshold: Similarity to an evaluation image that condemns a component.
        max_component_share: Share of files above which a component is a giant.
        retrieved: Pictures that a seed called up; None if nothing was retrieved.
    """
    groups = _group(collected, edges.at_least(near_threshold))
    evaluation_similarity = _similarity_to_evaluation(collected, edges)
    reasons = np.array([f.refusal or "" for f in collected.pile], dtype="<U32")
    reasons[groups.sound] = _sound_reasons(
        groups,
        leaks=evaluation_similarity >= np.float32(leak_threshold),
        retrieved=retrieved,
        num_pictures=len(collected.is_evaluation),
    )
    nearest, nearest_similarity = _nearest_files(collected, edges, groups)

    def for_files(values: NDArray[np.int64]) -> NDArray[np.int64]:
        spread = np.full(len(collected.pile), -1, dtype=np.int64)
        spread[groups.sound] = values
        return spread

    similarity = np.full(len(collected.pile), np.nan, dtype=np.float32)
    similarity[groups.sound] = evaluation_similarity[groups.pictures]
    sizes = np.bincount(groups.components, minlength=1)
    return Decisions(
        reasons=reasons,
        components=for_files(groups.components),
        sizes=for_files(sizes[groups.components]),
        representatives=for_files(groups.sound[groups.representatives[groups.components]]),
        nearest=nearest,
        nearest_similarity=nearest_similarity,
        evaluation_similarity=similarity,
        component_sizes=component_sizes(groups.components, max_share=max_component_share),
    )


def _group(collected: CollectedImages, near: Edges) -> _Groups:
    num_pictures = len(collected.is_evaluation)
    sound = np.flatnonzero(collected.pile_pictures >= 0)
    pictures = collected.pile_pictures[sound]
    in_pile = np.zeros(num_pictures, dtype=np.bool_)
    in_pile[pictures] = True
    within = near.within(in_pile)
    by_picture = label_components(num_pictures, within)
    components = _renumbered(by_picture[pictures])
    files = [collected.pile[number] for number in sound]
    quality = {
        "areas": np.array([f.width * f.height for f in files], dtype=np.int64),
        "sizes_bytes": np.array([f.size_bytes for f in files], dtype=np.int64),
    }
    names = np.array([f"{f.sha256} {f.name}" for f in files], dtype=np.str_)
    best = choose_representatives(pictures, names=names, **quality)
    is_best = np.zeros(len(sound), dtype=np.bool_)
    is_best[best] = True
    return _Groups(
        sound=sound,
        pictures=pictures,
        components=components,
        representatives=choose_representatives(components, names=names, **quality),
        best_of_picture=is_best,
    )


def _renumbered(labels: NDArray[np.int64]) -> NDArray[np.int64]:
    """The same groups numbered from 0 in the order of first appearance."""
    _, first, inverse = np.unique(labels, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first, kind="stable"), kind="stable")[inverse].astype(np.int64)


def _similarity_to_evaluation(collected: CollectedImages, edges: Edges) -> NDArray[np.float32]:
    """Of every picture to the nearest evaluation image, 1 if it is one, NaN if unknown [U]."""
    similarity = np.full(len(collected.is_evaluation), -np.inf, dtype=np.float32)
    for here, there in ((edges.first, edges.second), (edges.second, edges.first)):
        leaks = collected.is_evaluation[there]
        np.maximum.at(similarity, here[leaks], edges.similarity[leaks])
    similarity[collected.is_evaluation] = 1
    return np.where(np.isinf(similarity), np.float32(np.nan), similarity)


def _sound_reasons(
    groups: _Groups,
    *,
    leaks: NDArray[np.bool_],
    retrieved: NDArray[np.int64] | None,
    num_pictures: int,
) -> NDArray[np.str_]:
    reasons = np.full(len(groups.sound), Removal.NEAR_COPY.value, dtype="<U32")
    reasons[~groups.best_of_picture] = Removal.EXACT_COPY
    reasons[groups.representatives] = ""
    if retrieved is not None:
        is_retrieved = np.zeros(num_pictures, dtype=np.bool_)
        is_retrieved[retrieved] = True
        # A copy that is called up speaks for its whole component.
        called = np.unique(groups.components[is_retrieved[groups.pictures]])
        is_dropped = ~np.isin(groups.components, called) & (reasons == "")
        reasons[is_dropped] = Removal.NOT_RETRIEVED
    condemned = np.unique(groups.components[leaks[groups.pictures]])
    reasons[np.isin(groups.components, condemned)] = Removal.EVALUATION_LEAK
    return reasons


def _nearest_files(
    collected: CollectedImages, edges: Edges, groups: _Groups
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Most similar other file of every file and the similarity; equal pixels count as 1."""
    num_pictures = len(collected.is_evaluation)
    best_file = np.full(num_pictures, -1, dtype=np.int64)
    best_file[groups.pictures[groups.best_of_picture]] = groups.sound[groups.best_of_picture]
    in_pile = edges.within(best_file >= 0)
    here = np.concatenate([in_pile.first, in_pile.second])
    there = np.concatenate([in_pile.second, in_pile.first])
    similarity = np.concatenate([in_pile.similarity, in_pile.similarity])
    order = np.lexsort((there, -similarity, here))
    pictures, first = np.unique(here[order], return_index=True)
    nearest_picture = np.full(num_pictures, -1, dtype=np.int64)
    nearest_picture[pictures] = there[order][first]
    picture_similarity = np.full(num_pictures, np.nan, dtype=np.float32)
    picture_similarity[pictures] = similarity[order][first]
    nearest = np.full(len(collected.pile), -1, dtype=np.int64)
    nearest_similarity = np.full(len(collected.pile), np.nan, dtype=np.float32)
    known = nearest_picture[groups.pictures] >= 0
    nearest[groups.sound[known]] = best_file[nearest_picture[groups.pictures[known]]]
    nearest_similarity[groups.sound] = picture_similarity[groups.pictures]
    _point_to_equals(nearest, nearest_similarity, groups)
    return nearest, nearest_similarity


def _point_to_equals(
    nearest: NDArray[np.int64], similarity: NDArray[np.float32], groups: _Groups
) -> None:
    """Files with equal pixels are each other's nearest: the next in a ring, in place."""
    order = np.argsort(groups.pictures, kind="stable")
    for ring in np.split(order, np.flatnonzero(np.diff(groups.pictures[order])) + 1):
        if len(ring) > 1:
            nearest[groups.sound[ring]] = groups.sound[np.roll(ring, -1)]
            similarity[groups.sound[ring]] = 1
