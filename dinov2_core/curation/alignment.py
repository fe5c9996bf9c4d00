"""Alignment: finds cropped, resized and re-encoded copies by comparing aligned thumbnails.

An index proposes pairs, an exact comparison decides. An embedding of pixels does not distinguish a
crop from another image of the same kind, and for two similar products neither does a semantic one.
So the index is searched with a hundred hypothetical crops of every thumbnail; a pair found that way
is aligned by hill climbing over the edges of the crop, and the two are compared after whitening: a
mismatch in directions in which images rarely differ counts most.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional

from dinov2_core.curation.deduplication import Edges, make_edges
from dinov2_core.curation.image_files import Progress, no_progress
from dinov2_core.curation.neighbours import CosineIndex

THUMBNAIL_SIDE = 32
"""Pixels of a square gray thumbnail."""

_VIEW_SIDE = 12
_NUM_DIMENSIONS = 96
_LATTICE = 100
_MAX_SHIFT = 18
_COARSE_SHIFTS = (0, 5, 10, 15)
_CLIMB_STEPS = (2, 1, 1)
_HITS_PER_VIEW = 4
_VIEW_CHUNK_IMAGES = 256
_PAIR_CHUNK = 4096
_MAX_FIT_IMAGES = 20_000
_PRIOR_IMAGES = 200
_PRIOR_LENGTH = 4.0
_NUM_PROBES = 6
_MAX_FLAT_VIEWS = 4096
"""Images up to which the search is exact; it has a hundred queries per image."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Whitening:
    mean: Tensor
    """[144]."""
    projection: Tensor
    """[144, 96]."""

    def __call__(self, views: Tensor) -> Tensor:
        """Unit vectors [..., 96] of normalised views [..., 144]."""
        return functional.normalize((views - self.mean) @ self.projection, dim=-1)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Candidates:
    """Pairs of which `copy` may be a crop of `original`, and the best coarse crop of each."""

    original: Tensor
    """[P]."""
    copy: Tensor
    """[P]."""
    rows: Tensor
    """[P, 2]: top cut, bottom cut in hundredths."""
    columns: Tensor
    """[P, 2]: left cut, right cut in hundredths."""


def thumbnail(image: Image.Image) -> NDArray[np.uint8]:
    """Gray square [32, 32] of an image in mode `L` or `RGB`, aspect ratio not kept."""
    size = (THUMBNAIL_SIDE, THUMBNAIL_SIDE)
    gray = image if image.mode == "L" else image.convert("L")
    return np.asarray(gray.resize(size, Image.Resampling.BICUBIC))


def find_aligned_copies(
    thumbnails: NDArray[np.uint8],
    *,
    proposals: Edges,
    candidate_threshold: float,
    edge_threshold: float,
    progress: Progress = no_progress,
) -> Edges:
    """Edges between images of which one is a crop of the other of at least 85 % of each side.

    Args:
        thumbnails: [N, 32, 32].
        proposals: Pairs found by an embedding, which are compared as well.
        candidate_threshold: Whitened cosine of a coarse alignment from which a pair is aligned
            exactly. Low costs time, high misses crops between the coarse ones.
        edge_threshold: Smallest whitened cosine after alignment that makes an edge.
        progress: Reports images searched and pairs aligned.
    """
    if len(thumbnails) < 2:
        return make_edges(proposals.first[:0], proposals.second[:0], proposals.similarity[:0])
    images = torch.from_numpy(thumbnails).float()
    table = _interval_table()
    upright = _normalized(table[0, 0] @ images @ table[0, 0].T)  # [N, 144]
    whitening = _fit_whitening(upright)
    candidates = _propose(
        images,
        whitened=whitening(upright),
        whitening=whitening,
        proposals=proposals,
        threshold=candidate_threshold,
        progress=progress,
    )
    similarities = []
    total = len(candidates.original)
    for start in range(0, total, _PAIR_CHUNK):
        part = slice(start, start + _PAIR_CHUNK)
        copies = candidates.copy[part]
        aligned = _align(
            images[candidates.original[part]],
            upright[copies],
            rows=candidates.rows[part],
            columns=candidates.columns[part],
            table=table,
        )
        similarities.append((whitening(aligned) * whitening(upright[copies])).sum(dim=1))
        progress("align", min(start + _PAIR_CHUNK, total), total)
    similarity = torch.cat([*similarities, torch.zeros(0)]).numpy()
    is_edge = similarity >= edge_threshold
    return make_edges(
        candidates.original.numpy()[is_edge],
        candidates.copy.numpy()[is_edge],
        similarity[is_edge],
    )


def _interval_table() -> Tensor:
    """Area sampling of [cut, 1 - other cut] to 12 cells, for all pairs of cuts [19, 19, 12, 32]."""
    cuts = np.arange(_MAX_SHIFT + 1) / _LATTICE
    low, high = cuts[:, None, None], 1 - cuts[None, :, None]
    edges = (low + (high - low) * np.arange(_VIEW_SIDE + 1) / _VIEW_SIDE) * THUMBNAIL_SIDE
    pixels = np.arange(THUMBNAIL_SIDE)
    overlap = np.minimum(edges[..., 1:, None], pixels + 1)
    overlap = np.clip(overlap - np.maximum(edges[..., :-1, None], pixels), 0, None)
    return torch.from_numpy(overlap / overlap.sum(axis=-1, keepdims=True)).float()


def _coarse_cuts() -> Tensor:
    """Pairs of cuts that leave at least 85 % of a side [10, 2]."""
    return torch.tensor(
        [(a, b) for a in _COARSE_SHIFTS for b in _COARSE_SHIFTS if a + b <= _COARSE_SHIFTS[-1]]
    )


def _normalized(views: Tensor) -> Tensor:
    """Views [..., 12, 12] flattened, mean 0, length 1, [..., 144]; flat ones become zero."""
    flat = views.flatten(-2)
    return functional.normalize(flat - flat.mean(dim=-1, keepdim=True), dim=-1, eps=1e-3)


def _fit_whitening(views: Tensor) -> _Whitening:
    """Principal directions of the views, each divided by its deviation.

    The covariance is blended with that of smooth random images, worth 200 images, so that a few
    images whiten sensibly too.
    """
    sample = views[:: -(-len(views) // _MAX_FIT_IMAGES)].double().numpy()
    mean = sample.mean(axis=0)
    centred = sample - mean
    total = centred.T @ centred + _PRIOR_IMAGES * _smooth_covariance()
    values, vectors = np.linalg.eigh(total / (len(sample) + _PRIOR_IMAGES))
    deviations = np.sqrt(np.maximum(values[-_NUM_DIMENSIONS:], 0))
    projection = vectors[:, -_NUM_DIMENSIONS:] / (deviations + 1e-3 * deviations[-1])
    return _Whitening(
        mean=torch.from_numpy(mean).float(), projection=torch.from_numpy(projection).float()
    )


def _smooth_covariance() -> NDArray[np.float64]:
    """Covariance of mean-free unit images whose pixels correlate as exp(-distance / 4)."""
    rows, columns = np.indices((_VIEW_SIDE, _VIEW_SIDE)).reshape(2, -1)
    distances = np.hypot(rows[:, None] - rows, columns[:, None] - columns)
    centring = np.eye(len(rows)) - 1 / len(rows)
    covariance = centring @ np.exp(-distances / _PRIOR_LENGTH) @ centring
    scaled: NDArray[np.float64] = covariance / np.trace(covariance)
    return scaled


def _propose(
    images: Tensor,
    *,
    whitened: Tensor,
    whitening: _Whitening,
    proposals: Edges,
    threshold: float,
    progress: Progress,
) -> _Candidates:
    """Search the index with each coarse crop of every image; keep the best crop of every pair."""
    cuts = _coarse_cuts()
    table = _interval_table()[cuts[:, 0], cuts[:, 1]]  # [10, 12, 32]
    index = CosineIndex(whitened.numpy(), max_flat_vectors=_MAX_FLAT_VIEWS, num_probes=_NUM_PROBES)
    first = np.concatenate([proposals.first, proposals.second])
    second = np.concatenate([proposals.second, proposals.first])
    order = np.argsort(first, kind="stable")
    first, second = first[order], second[order]
    found: list[Tensor] = []  # columns: original, copy, view, similarity
    for start in range(0, len(images), _VIEW_CHUNK_IMAGES):
        stop = min(start + _VIEW_CHUNK_IMAGES, len(images))
        crops = torch.einsum("jni,bik,lmk->bjlnm", table, images[start:stop], table)
        views = whitening(_normalized(crops).flatten(1, 2))  # [b, 100, 96]
        queried = slice(*np.searchsorted(first, (start, stop)))
        own, other = torch.from_numpy(first[queried]), torch.from_numpy(second[queried])
        closest = torch.einsum("pve,pe->pv", views[own - start], whitened[other]).max(dim=1)
        found.append(_columns(own, other, closest.indices, closest.values, threshold))
        hits = index.search(views.flatten(0, 1).numpy(), num_neighbours=_HITS_PER_VIEW)
        similarity = torch.from_numpy(hits.similarities).view(-1)
        copies = torch.from_numpy(hits.indices).view(-1)
        numbers = torch.arange(len(copies)) // _HITS_PER_VIEW
        originals = start + numbers // views.shape[1]
        found.append(_columns(originals, copies, numbers % views.shape[1], similarity, threshold))
        progress("find candidates", stop, len(images))
    return _best_views(torch.cat(found), cuts)


def _columns(
    original: Tensor, copy: Tensor, view: Tensor, similarity: Tensor, threshold: float
) -> Tensor:
    keep = (similarity >= threshold) & (original != copy) & (copy >= 0)
    return torch.stack([c[keep].double() for c in (original, copy, view, similarity)], dim=1)


def _best_views(found: Tensor, cuts: Tensor) -> _Candidates:
    original, copy, view, similarity = found.numpy().T
    order = np.lexsort((view, -similarity, copy, original))
    original, copy = original[order].astype(np.int64), copy[order].astype(np.int64)
    is_new = np.ones(len(order), dtype=np.bool_)
    is_new[1:] = (original[1:] != original[:-1]) | (copy[1:] != copy[:-1])
    best = torch.from_numpy(view[order][is_new].astype(np.int64))
    return _Candidates(
        original=torch.from_numpy(original[is_new]),
        copy=torch.from_numpy(copy[is_new]),
        rows=cuts[best // len(cuts)],
        columns=cuts[best % len(cuts)],
    )


def _align(
    originals: Tensor, copies: Tensor, *, rows: Tensor, columns: Tensor, table: Tensor
) -> Tensor:
    """Originals [P, 32, 32] in the crop that correlates best with the copies [P, 144], as [P, 144].

    Hill climbing in hundredths of a side, the two cuts of one axis at a time.
    """
    upright = copies.view(-1, _VIEW_SIDE, _VIEW_SIDE)
    for step in _CLIMB_STEPS:
        sampled = originals @ table[columns[:, 0], columns[:, 1]].transpose(1, 2)  # [P, 32, 12]
        rows = _climb(sampled, upright, rows, step, table)
        sampled = (table[rows[:, 0], rows[:, 1]] @ originals).transpose(1, 2)  # [P, 32, 12]
        flipped = upright.transpose(1, 2)
        columns = _climb(sampled, flipped, columns, step, table)
    views = table[rows[:, 0], rows[:, 1]] @ originals
    return _normalized(views @ table[columns[:, 0], columns[:, 1]].transpose(1, 2))


def _climb(sampled: Tensor, copies: Tensor, cuts: Tensor, step: int, table: Tensor) -> Tensor:
    """The best of the nine neighbouring pairs of cuts along the first axis, [P, 2]."""
    best = torch.full((len(cuts),), -2.0)
    chosen = cuts
    for low in (0, -step, step):
        for high in (0, -step, step):
            tried = (cuts + torch.tensor((low, high))).clamp(0, _MAX_SHIFT)
            views = _normalized(table[tried[:, 0], tried[:, 1]] @ sampled)
            correlation = (views * copies.flatten(1)).sum(dim=1)
            is_better = correlation > best
            best = torch.where(is_better, correlation, best)
            chosen = torch.where(is_better[:, None], tried, chosen)
    return chosen
