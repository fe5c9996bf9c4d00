"""Weighted nearest neighbours against a naive loop and scikit-learn."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor

from dinov2_core.evaluation import knn
from dinov2_core.evaluation.knn import knn_accuracies, nearest_neighbours


def blobs(*, count: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(5, 8, generator=torch.Generator().manual_seed(99))
    labels = torch.randint(5, (count,), generator=generator)
    return centres[labels] + 1.2 * torch.randn(count, 8, generator=generator), labels


def naive_accuracy(
    train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor, k: int
) -> float:
    right = 0
    for query, label in zip(test.tolist(), test_labels.tolist(), strict=True):
        found = []
        for reference, reference_label in zip(train.tolist(), train_labels.tolist(), strict=True):
            dot = sum(a * b for a, b in zip(query, reference, strict=True))
            cosine = dot / math.hypot(*query) / math.hypot(*reference)
            found.append((cosine, reference_label))
        votes: dict[int, float] = {}
        for cosine, reference_label in sorted(found, reverse=True)[:k]:
            votes[reference_label] = votes.get(reference_label, 0) + math.exp(cosine / 0.07)
        right += max(votes, key=lambda name: votes[name]) == label
    return right / len(test_labels)


def test_accuracies_equal_a_naive_loop() -> None:
    train, train_labels = blobs(count=90, seed=0)
    test, test_labels = blobs(count=40, seed=1)
    found = knn_accuracies(
        train_features=train,
        train_labels=train_labels,
        test_features=test,
        test_labels=test_labels,
        num_neighbours=(1, 5, 20),
    )
    for k, accuracy in found.items():
        assert accuracy == pytest.approx(
            naive_accuracy(train, train_labels, test, test_labels, k), abs=1e-12
        )


def test_accuracies_equal_scikit_learn() -> None:
    train, train_labels = blobs(count=400, seed=0)
    test, test_labels = blobs(count=200, seed=1)
    found = knn_accuracies(
        train_features=train,
        train_labels=train_labels,
        test_features=test,
        test_labels=test_labels,
        num_neighbours=(10, 50),
    )
    for k, accuracy in found.items():
        classifier = KNeighborsClassifier(
            k, metric="cosine", weights=lambda distances: np.exp((1 - distances) / 0.07)
        )
        classifier.fit(train.double().numpy(), train_labels.numpy())
        assert accuracy == classifier.score(test.double().numpy(), test_labels.numpy())


def test_chunks_do_not_change_the_neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    train, _ = blobs(count=50, seed=0)
    test, _ = blobs(count=23, seed=1)
    whole = nearest_neighbours(test, references=train, num_neighbours=7)
    monkeypatch.setattr(knn, "_CHUNK_SIMILARITIES", 120)
    chunked = nearest_neighbours(test, references=train, num_neighbours=7)
    torch.testing.assert_close(chunked.similarities, whole.similarities)
    assert torch.equal(chunked.indices, whole.indices)


def test_the_nearest_of_an_image_among_themselves_is_itself() -> None:
    train, _ = blobs(count=30, seed=0)
    found = nearest_neighbours(train, references=train, num_neighbours=3)
    assert found.indices[:, 0].tolist() == list(range(30))
    assert (found.similarities.diff(dim=1) <= 0).all()


def test_nearly_equal_features_are_still_told_apart() -> None:
    train, train_labels = blobs(count=200, seed=0)
    test, test_labels = blobs(count=100, seed=1)
    shift = 1e4 * torch.eye(9)[8]
    plain = knn_accuracies(
        train_features=torch.nn.functional.pad(train, (0, 1)) * 0.5 + shift,
        train_labels=train_labels,
        test_features=torch.nn.functional.pad(test, (0, 1)) * 0.5 + shift,
        test_labels=test_labels,
        num_neighbours=(5,),
    )
    assert plain[5] > 0.5


def test_impossible_requests_are_refused() -> None:
    train, labels = blobs(count=10, seed=0)

    def accuracies(*, num_neighbours: tuple[int, ...], temperature: float) -> None:
        knn_accuracies(
            train_features=train,
            train_labels=labels,
            test_features=train,
            test_labels=labels,
            num_neighbours=num_neighbours,
            temperature=temperature,
        )

    with pytest.raises(ValueError, match="num_neighbours 11 is not between 1 and the 10"):
        accuracies(num_neighbours=(1, 11), temperature=0.07)
    with pytest.raises(ValueError, match="at least one"):
        accuracies(num_neighbours=(), temperature=0.07)
    with pytest.raises(ValueError, match=r"temperature 0\.0"):
        accuracies(num_neighbours=(1,), temperature=0.0)
