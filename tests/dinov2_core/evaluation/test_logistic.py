"""Logistic regression against exact solutions."""

from __future__ import annotations

import tracemalloc

import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from dinov2_core.evaluation.logistic import _held_out, logistic_score

NUM_CLASSES = 4


def blobs(*, count: int, seed: int, spread: float = 1.5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(NUM_CLASSES, 12, generator=torch.Generator().manual_seed(99))
    labels = torch.randint(NUM_CLASSES, (count,), generator=generator)
    noise = spread * torch.randn(count, 12, generator=generator)
    scale = torch.logspace(-3, 2, 12)
    return (centres[labels] + noise) * scale + 5, labels


def exactly_fitted(features: Tensor, labels: Tensor, *, strength: float) -> Pipeline:
    """By Newton's method, in float64."""
    solver = LogisticRegression(C=strength, solver="newton-cholesky", tol=1e-8)
    return make_pipeline(StandardScaler(), solver).fit(features.double().numpy(), labels.numpy())


def test_the_score_is_that_of_the_exact_solution() -> None:
    train, train_labels = blobs(count=400, seed=0)
    test, test_labels = blobs(count=300, seed=1)
    score = logistic_score(
        train_features=train,
        train_labels=train_labels,
        test_features=test,
        test_labels=test_labels,
    )
    exact = exactly_fitted(train, train_labels, strength=score.inverse_regularisation)
    assert score.top1 == pytest.approx(exact.score(test.numpy(), test_labels.numpy()), abs=0.004)
    assert score.top1 > 0.6


def test_the_strength_is_chosen_on_the_held_out_images() -> None:
    train, labels = blobs(count=400, seed=0)
    grid = (1e-4, 1e-2, 1.0)
    score = logistic_score(
        train_features=train,
        train_labels=labels,
        test_features=train[:5],
        test_labels=labels[:5],
        grid=grid,
    )
    is_held_out = _held_out(labels, seed=0)
    held_out = {}
    for strength in grid:
        exact = exactly_fitted(train[~is_held_out], labels[~is_held_out], strength=strength)
        found = exact.score(train[is_held_out].numpy(), labels[is_held_out].numpy())
        held_out[strength] = pytest.approx(found, abs=1e-9)
    assert held_out[score.inverse_regularisation] == score.held_out_top1
    assert score.held_out_top1 == max(found.expected for found in held_out.values())


def test_a_constant_feature_does_no_harm() -> None:
    features, labels = blobs(count=200, seed=0)
    scores = []
    for value in (7.0, 0.0):
        features[:, 3] = value
        scores.append(
            logistic_score(
                train_features=features,
                train_labels=labels,
                test_features=features,
                test_labels=labels,
            )
        )
    assert scores[0] == scores[1]
    assert scores[0].top1 > 0.5


def test_nothing_copies_the_features_once_more() -> None:
    features, labels = blobs(count=20_000, seed=0)
    features = features.repeat(1, 20)  # [20000, 240]
    tracemalloc.start()
    logistic_score(
        train_features=features,
        train_labels=labels,
        test_features=features[:5],
        test_labels=labels[:5],
        grid=(1e-3,),
    )
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 0.15 * features.nbytes  # the copy itself is torch's and not counted


def test_strong_noise_is_met_with_strong_regularisation() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(2, (200,), generator=generator)
    features = torch.randn(200, 150, generator=generator)
    features[:, 0] += 1.5 * labels
    score = logistic_score(
        train_features=features[:100],
        train_labels=labels[:100],
        test_features=features[100:],
        test_labels=labels[100:],
        grid=(1e-2, 1e3),
    )
    assert score.inverse_regularisation == 1e-2


def test_the_score_is_the_same_every_time() -> None:
    train, labels = blobs(count=100, seed=0)
    scores = [
        logistic_score(
            train_features=train, train_labels=labels, test_features=train, test_labels=labels
        )
        for _ in range(2)
    ]
    assert scores[0] == scores[1]


def test_every_class_gives_a_tenth() -> None:
    labels = torch.arange(5).repeat_interleave(40)[torch.randperm(200)]
    is_held_out = _held_out(labels, seed=3)
    assert labels[is_held_out].bincount().tolist() == [4] * 5
    assert torch.equal(is_held_out, _held_out(labels, seed=3))
    assert not torch.equal(is_held_out, _held_out(labels, seed=4))


@pytest.mark.parametrize(
    ("count", "grid", "reason"),
    [
        (19, (1.0,), "19 train images are too few"),
        (40, (), "grid"),
        (40, (1.0, 0.1), "ascending"),
        (40, (0.0, 1.0), "positive"),
    ],
)
def test_impossible_requests_are_refused(count: int, grid: tuple[float, ...], reason: str) -> None:
    features, labels = blobs(count=count, seed=0)
    with pytest.raises(ValueError, match=reason):
        logistic_score(
            train_features=features,
            train_labels=labels,
            test_features=features,
            test_labels=labels,
            grid=grid,
        )
