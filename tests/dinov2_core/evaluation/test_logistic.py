"""Logistic regression against scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from dinov2_core.evaluation.logistic import _held_out, fit_logistic, logistic_score

NUM_CLASSES = 4


def blobs(*, count: int, seed: int, spread: float = 1.5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(NUM_CLASSES, 12, generator=torch.Generator().manual_seed(99))
    labels = torch.randint(NUM_CLASSES, (count,), generator=generator)
    noise = spread * torch.randn(count, 12, generator=generator)
    scale = torch.logspace(-3, 2, 12)
    return (centres[labels] + noise) * scale + 5, labels


@pytest.mark.parametrize("strength", [1e-3, 1e-1, 10.0])
def test_the_solution_equals_scikit_learn(strength: float) -> None:
    features, labels = blobs(count=300, seed=0)
    found = fit_logistic(
        features, labels=labels, num_classes=NUM_CLASSES, inverse_regularisation=strength
    )
    standardised = ((features - found.feature_mean) / found.feature_deviation).double().numpy()
    np.testing.assert_allclose(standardised.mean(axis=0), 0, atol=1e-4)
    np.testing.assert_allclose(standardised.std(axis=0), 1, atol=1e-4)
    expected = LogisticRegression(C=strength, tol=1e-8, max_iter=5000)
    expected.fit(standardised, labels.numpy())
    np.testing.assert_allclose(found.weight.T, expected.coef_, atol=2e-3, rtol=5e-3)
    assert found.accuracy(features, labels=labels) == pytest.approx(
        expected.score(standardised, labels.numpy()), abs=0.004
    )


def test_the_start_does_not_change_the_solution() -> None:
    features, labels = blobs(count=300, seed=0)
    first = fit_logistic(
        features, labels=labels, num_classes=NUM_CLASSES, inverse_regularisation=1.0
    )
    other = fit_logistic(
        features, labels=labels, num_classes=NUM_CLASSES, inverse_regularisation=0.01
    )
    again = fit_logistic(
        features, labels=labels, num_classes=NUM_CLASSES, inverse_regularisation=1.0, start=other
    )
    torch.testing.assert_close(again.weight, first.weight, atol=2e-3, rtol=0)


def test_a_constant_feature_does_no_harm() -> None:
    features, labels = blobs(count=100, seed=0)
    features[:, 3] = 7.0
    found = fit_logistic(
        features, labels=labels, num_classes=NUM_CLASSES, inverse_regularisation=1.0
    )
    assert found.weight.isfinite().all()
    assert found.weight[3].abs().max() < 1e-4


def test_the_score_is_that_of_the_chosen_strength() -> None:
    train, train_labels = blobs(count=400, seed=0)
    test, test_labels = blobs(count=300, seed=1)
    score = logistic_score(
        train_features=train,
        train_labels=train_labels,
        test_features=test,
        test_labels=test_labels,
    )
    refitted = fit_logistic(
        train,
        labels=train_labels,
        num_classes=NUM_CLASSES,
        inverse_regularisation=score.inverse_regularisation,
    )
    assert score.top1 == refitted.accuracy(test, labels=test_labels)
    assert score.top1 > 0.6
    assert 0 < score.held_out_top1 <= 1


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
    assert torch.equal(scores[0].classifier.weight, scores[1].classifier.weight)


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
