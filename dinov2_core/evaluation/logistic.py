"""Multinomial logistic regression on frozen features, its strength chosen on held-out images."""

from __future__ import annotations

import logging
import warnings
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from torch import Tensor

_LOGGER = logging.getLogger(__name__)
_MAX_WORSE = 2
_SEARCH_ITERATIONS = 200  # per strength, each starting from the one before
_FIT_ITERATIONS = 1000
_TOLERANCE = 1e-5  # of the largest gradient


@dataclass(frozen=True, slots=True, kw_only=True)
class LogisticScore:
    """How well a linear classifier reads the classes off frozen features."""

    top1: float
    """Share of test images classified rightly, in [0, 1]."""
    inverse_regularisation: float
    """The strength C that was chosen."""
    held_out_top1: float
    """Accuracy of that strength on the held-out tenth of the train set, in [0, 1]."""


def logistic_score(
    *,
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    grid: tuple[float, ...] = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0),
    seed: int = 0,
) -> LogisticScore:
    """Choose C on a held-out tenth of the train set, fit again on all of it, test.

    The protocol of arXiv:2304.07193 on a smaller grid; at equal accuracy the smaller C is taken.
    The test set has no part in the choice. Each feature is first brought to mean 0 and deviation 1
    over the train set, so that one grid serves every backbone.

    Memory besides the features: a float32 copy of the train features (4 GB for a million images of
    1,024 features) and a few arrays of scores [N, K].

    Args:
        train_features: [N, D], N >= 20, any float dtype, on the CPU.
        train_labels: Classes [N], int64, at least two.
        test_features: [Q, D].
        test_labels: Classes [Q].
        grid: Strengths C to try, ascending; the search ends after two that are no better.
        seed: Of the held-out tenth.
    """
    if not grid or list(grid) != sorted(grid) or grid[0] <= 0:
        raise ValueError(f"grid {grid} must be ascending positive numbers, at least one")
    if len(train_features) < 20:
        raise ValueError(
            f"{len(train_features)} train images are too few to hold a tenth out; label at least 20"
        )
    is_held_out = _held_out(train_labels, seed=seed)
    order = is_held_out.int().argsort(stable=True)  # the held-out images come last
    num_fitted = len(order) - int(is_held_out.sum())
    features, labels = train_features[order].float().numpy(), train_labels[order].numpy()
    mean, deviation = _standardise(features)
    search = LogisticRegression(tol=_TOLERANCE, max_iter=_SEARCH_ITERATIONS, warm_start=True)
    chosen, chosen_top1, num_worse = grid[0], -1.0, 0
    for strength in grid:
        _fit(search.set_params(C=strength), features[:num_fitted], labels[:num_fitted])
        top1 = float(search.score(features[num_fitted:], labels[num_fitted:]))
        _LOGGER.info("logistic regression with C %s: held-out accuracy %.4f", strength, top1)
        if top1 > chosen_top1:
            chosen, chosen_top1, num_worse = strength, top1, 0
            continue
        num_worse += 1
        if num_worse == _MAX_WORSE:
            break
    classifier = LogisticRegression(C=chosen, tol=_TOLERANCE, max_iter=_FIT_ITERATIONS)
    _fit(classifier, features, labels)
    tested = (test_features.float().numpy() - mean) / deviation
    return LogisticScore(
        top1=float(classifier.score(tested, test_labels.numpy())),
        inverse_regularisation=chosen,
        held_out_top1=chosen_top1,
    )


def _fit(
    classifier: LogisticRegression, features: NDArray[np.float32], labels: NDArray[np.int64]
) -> None:
    with warnings.catch_warnings():  # stopped short of convergence, it is scored as it is
        warnings.simplefilter("ignore", ConvergenceWarning)
        classifier.fit(features, labels)


def _standardise(
    features: NDArray[np.float32],
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Bring features [N, D] to mean 0 and deviation 1, in place; gives what both were [D]."""
    mean = features.mean(axis=0, dtype=np.float64).astype(np.float32)
    features -= mean
    deviation = np.sqrt(
        np.einsum("nd,nd->d", features, features, dtype=np.float64) / len(features)
    ).astype(np.float32)
    deviation[deviation == 0] = 1
    features /= deviation
    return mean, deviation


def _held_out(labels: Tensor, *, seed: int) -> Tensor:
    """Mark every tenth image [N] of a seeded order grouped by class: a tenth of each class."""
    generator = torch.Generator().manual_seed(seed)
    shuffled = torch.randperm(len(labels), generator=generator)
    grouped = shuffled[labels[shuffled].argsort(stable=True)]
    is_held_out = torch.zeros(len(labels), dtype=torch.bool)
    is_held_out[grouped[5::10]] = True
    return is_held_out
