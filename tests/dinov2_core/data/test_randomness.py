"""randomness: a function of its arguments, and random."""

from __future__ import annotations

import numpy as np

from dinov2_core.data.randomness import Stream, hashed_bits, hashed_uniforms


def test_positions_can_be_asked_in_any_order_and_company() -> None:
    together = hashed_bits(np.arange(100), seed=3, stream=Stream.CROPS, num_draws=7)
    alone = hashed_bits(np.array([42]), seed=3, stream=Stream.CROPS, num_draws=3)
    assert np.array_equal(together[42, :3], alone[0])


def test_seed_stream_position_and_draw_all_matter() -> None:
    words = [
        hashed_bits(np.arange(50), seed=seed, stream=stream, num_draws=8)
        for seed in (0, 1, 2)
        for stream in Stream
    ]
    everything = np.concatenate([block.ravel() for block in words])
    assert len(np.unique(everything)) == everything.size


def test_uniforms_are_uniform_and_uncorrelated() -> None:
    values = hashed_uniforms(np.arange(20_000), seed=0, stream=Stream.COLORS, num_draws=4)
    assert values.min() >= 0
    assert values.max() < 1
    counts = np.stack([np.histogram(column, bins=50, range=(0, 1))[0] for column in values.T])
    chi_square = ((counts - 400) ** 2 / 400).sum(axis=1)
    assert (chi_square < 95).all()  # 49 degrees of freedom, p = 1e-4
    correlation = np.corrcoef(np.vstack([values.T, np.roll(values[:, 0], 1)]))
    assert np.abs(correlation - np.eye(5)).max() < 0.03
