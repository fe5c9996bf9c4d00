"""Measures of collapse against naive loops and known cases."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import cosine_similarity, one_hot

from dinov2_core.evaluation.collapse import (
    collapse_report,
    effective_rank,
    feature_deviation,
    mean_pairwise_cosine,
    prototype_usage,
)


def features() -> torch.Tensor:
    return torch.randn(60, 16, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("rank", [1, 4, 16])
def test_orthogonal_directions_of_equal_weight_count_as_the_rank(rank: int) -> None:
    rows = torch.eye(16)[torch.arange(64) % rank]
    assert effective_rank(rows) == pytest.approx(rank, rel=1e-3)


def test_effective_rank_is_the_papers_formula() -> None:
    values = torch.linalg.svd(features().double()).S.tolist()
    shares = [value / sum(values) + 1e-7 for value in values]
    expected = math.exp(-sum(share * math.log(share) for share in shares))
    assert effective_rank(features()) == pytest.approx(expected, rel=1e-9)
    assert effective_rank(features()) == pytest.approx(effective_rank(1e3 * features()), rel=1e-6)


def test_mean_cosine_equals_a_naive_loop() -> None:
    rows = features().double()
    pairs = [
        cosine_similarity(rows[i], rows[j], dim=0).item()
        for i in range(60)
        for j in range(60)
        if i != j
    ]
    assert mean_pairwise_cosine(rows) == pytest.approx(sum(pairs) / len(pairs), abs=1e-12)


def test_spread_features_deviate_and_collapsed_ones_do_not() -> None:
    spread = torch.randn(4000, 64, generator=torch.Generator().manual_seed(0))
    assert feature_deviation(spread) == pytest.approx(1 / 8, rel=0.02)
    collapsed = torch.ones(10, 64)
    assert feature_deviation(collapsed) == pytest.approx(0, abs=1e-12)
    assert mean_pairwise_cosine(collapsed) == pytest.approx(1)
    assert effective_rank(collapsed) == pytest.approx(1, rel=1e-3)


def test_prototypes_are_counted_by_first_choice() -> None:
    scores = one_hot(torch.tensor([0, 0, 1, 1, 5, 5]), 8).float()
    usage = prototype_usage(scores)
    assert usage.share == pytest.approx(3 / 8)
    assert usage.effective_number == pytest.approx(3)
    single = prototype_usage(scores[:2])
    assert single.share == pytest.approx(1 / 8)
    assert single.effective_number == pytest.approx(1)


def test_the_report_holds_every_measure() -> None:
    report = collapse_report(features(), scores=features())
    assert report.effective_rank == effective_rank(features())
    assert report.feature_deviation == feature_deviation(features())
    assert report.mean_cosine == mean_pairwise_cosine(features())
    assert report.prototypes == prototype_usage(features())
    assert collapse_report(features()).prototypes is None


@pytest.mark.parametrize("shape", [(1, 4), (3,), (2, 3, 4)])
def test_a_sample_has_at_least_two_rows(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="cannot be judged for collapse"):
        effective_rank(torch.zeros(shape))
