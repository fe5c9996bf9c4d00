"""Dropped paths as a function of (seed, step, rank), so that no random state is saved."""

from __future__ import annotations

import hashlib

import torch


def step_seed(seed: int, *, step: int, rank: int) -> int:
    """A 63-bit seed, unrelated for neighbouring seeds, steps and ranks."""
    digest = hashlib.sha256(f"step {seed} {step} {rank}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def seed_step(seed: int, *, step: int, rank: int) -> None:
    """Restart torch's default generators before a step.

    Stochastic depth draws from them. What a step draws depends on nothing before it: resuming
    needs no saved state, and goes on bit for bit when the number of ranks is the same. Order,
    crops and masks have streams of their own and do not depend on the rank count either.
    """
    torch.manual_seed(step_seed(seed, step=step, rank=rank))
