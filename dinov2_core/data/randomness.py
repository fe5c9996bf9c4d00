"""Random numbers as a pure function of (seed, stream, position): nothing to save or to skip."""

from __future__ import annotations

from enum import IntEnum

import numpy as np
from numpy.typing import NDArray


class Stream(IntEnum):
    """What random numbers are for; two streams of one seed are independent."""

    ORDER = 1
    """Order of the images."""
    CROPS = 2
    """Boxes and flips."""
    COLORS = 3
    """Colour operations."""
    MASK_STRATA = 4
    """Which crops of a global batch are masked, and how much."""
    MASK_BLOCKS = 5
    """Blocks of one crop's mask."""


def hashed_bits(
    positions: NDArray[np.int64], *, seed: int, stream: Stream, num_draws: int
) -> NDArray[np.uint64]:
    """Independent 64-bit words for every position.

    Counter-based: the words come from mixing (seed, stream, position, draw) with the finaliser of
    SplitMix64 (Steele, Lea, Flood, OOPSLA 2014), so any position can be asked in any order.

    Args:
        positions: Non-negative positions [P].
        seed: Non-negative seed of the run.
        stream: What the numbers are for.
        num_draws: Words per position.

    Returns:
        Words [P, num_draws].
    """
    state = mixed(np.array([seed], dtype=np.uint64))
    state = mixed(state ^ np.uint64(stream))
    state = mixed(state ^ positions.astype(np.uint64))
    return mixed(state[:, None] ^ mixed(np.arange(1, num_draws + 1, dtype=np.uint64))[None, :])


def hashed_uniforms(
    positions: NDArray[np.int64], *, seed: int, stream: Stream, num_draws: int
) -> NDArray[np.float64]:
    """Numbers of [0, 1) for every position, [P, num_draws]; see `hashed_bits`."""
    words = hashed_bits(positions, seed=seed, stream=stream, num_draws=num_draws)
    return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53


def mixed(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """A bijection of 64-bit words in which every input bit moves every output bit."""
    words = words + np.uint64(0x9E3779B97F4A7C15)
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))
