"""Multinomial logistic regression on frozen features, its strength chosen on held-out images."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

_LOGGER = logging.getLogger(__name__)
_PATIENCE = 2
_SEARCH_ITERATIONS = 200  # per strength, each starting from the one before


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearClassifier:
    """A linear classifier of standardised features."""

    weight: Tensor
    """[D, K], for standardised features."""
    bias: Tensor
    """[K]."""
    feature_mean: Tensor
    """[D], of the images it was fitted on."""
    feature_deviation: Tensor
    """[D], of the images it was fitted on; 1 where a feature is constant."""

    def predict(self, features: Tensor) -> Tensor:
        """Return the likeliest class [N] of each row of features [N, D]."""
        standardised = (features.float() - self.feature_mean) / self.feature_deviation
        return (standardised @ self.weight + self.bias).argmax(dim=1)

    def accuracy(self, features: Tensor, *, labels: Tensor) -> float:
        """Return the share of features [N, D] whose label [N] is predicted, in [0, 1]."""
        return (self.predict(features) == labels).double().mean().item()


@dataclass(frozen=True, slots=True, kw_only=True)
class LogisticScore:
    """How well a linear classifier reads the classes off frozen features."""

    top1: float
    """Share of test images classified rightly, in [0, 1]."""
    inverse_regularisation: float
    """The strength C that was chosen."""
    held_out_top1: float
    """Accuracy of that strength on the held-out tenth of the train set, in [0, 1]."""
    classifier: LinearClassifier
    """Fitted on the whole train set."""


def fit_logistic(
    features: Tensor,
    *,
    labels: Tensor,
    num_classes: int,
    inverse_regularisation: float,
    start: LinearClassifier | None = None,
    max_iterations: int = 500,
) -> LinearClassifier:
    """Minimise C * sum(cross-entropy) + |weight|^2 / 2 by L-BFGS; the bias goes free.

    Each feature is first brought to mean 0 and deviation 1 over the given images, so that one grid
    of C serves every backbone. The problem is convex: the start changes only the time.

    Args:
        features: [N, D], any float dtype, on the device that shall compute.
        labels: Classes [N], int64, in [0, num_classes).
        num_classes: Number of classes.
        inverse_regularisation: C > 0; larger fits more closely.
        start: A solution for another C, as first guess.
        max_iterations: Steps of L-BFGS after which it stops short of convergence.
    """
    features = features.float()
    mean, deviation = features.mean(dim=0), features.std(dim=0, correction=0)
    deviation = torch.where(deviation > 0, deviation, torch.ones_like(deviation))
    standardised = (features - mean) / deviation
    weight = features.new_zeros(features.shape[1], num_classes)
    bias = features.new_zeros(num_classes)
    if start is not None:
        weight.copy_(start.weight)
        bias.copy_(start.bias)
    weight.requires_grad_()
    bias.requires_grad_()
    penalty = 1 / (2 * inverse_regularisation * len(features))
    optimizer = torch.optim.LBFGS(
        [weight, bias],
        max_iter=max_iterations,
        max_eval=2 * max_iterations,
        tolerance_grad=1e-5,
        tolerance_change=1e-9,
        line_search_fn="strong_wolfe",
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = cross_entropy(standardised @ weight + bias, labels)
        value = value + penalty * weight.square().sum()
        value.backward()  # type: ignore[no-untyped-call]
        return value

    optimizer.step(loss)  # type: ignore[no-untyped-call]
    return LinearClassifier(
        weight=weight.detach(),
        bias=bias.detach(),
        feature_mean=mean,
        feature_deviation=deviation,
    )


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
    The test set has no part in the choice.

    Args:
        train_features: [N, D], N >= 20.
        train_labels: Classes [N], int64.
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
    num_classes = int(torch.maximum(train_labels.max(), test_labels.max())) + 1
    is_held_out = _held_out(train_labels, seed=seed)
    fitted: LinearClassifier | None = None
    chosen, chosen_top1, num_worse = grid[0], -1.0, 0
    for strength in grid:
        fitted = fit_logistic(
            train_features[~is_held_out],
            labels=train_labels[~is_held_out],
            num_classes=num_classes,
            inverse_regularisation=strength,
            start=fitted,
            max_iterations=_SEARCH_ITERATIONS,
        )
        top1 = fitted.accuracy(train_features[is_held_out], labels=train_labels[is_held_out])
        _LOGGER.info("logistic regression with C %s: held-out accuracy %.4f", strength, top1)
        if top1 > chosen_top1:
            chosen, chosen_top1, num_worse = strength, top1, 0
            continue
        num_worse += 1
        if num_worse == _PATIENCE:
            break
    classifier = fit_logistic(
        train_features,
        labels=train_labels,
        num_classes=num_classes,
        inverse_regularisation=chosen,
    )
    return LogisticScore(
        top1=classifier.accuracy(test_features, labels=test_labels),
        inverse_regularisation=chosen,
        held_out_top1=chosen_top1,
        classifier=classifier,
    )


def _held_out(labels: Tensor, *, seed: int) -> Tensor:
    """Mark every tenth image [N] of a seeded order grouped by class: a tenth of each class."""
    generator = torch.Generator().manual_seed(seed)
    shuffled = torch.randperm(len(labels), generator=generator).to(labels.device)
    grouped = shuffled[labels[shuffled].argsort(stable=True)]
    is_held_out = torch.zeros(len(labels), dtype=torch.bool, device=labels.device)
    is_held_out[grouped[5::10]] = True
    return is_held_out
