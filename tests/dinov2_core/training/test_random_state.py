"""random_state: every (seed, step, rank) draws its own numbers, whatever was drawn before."""

from __future__ import annotations

import torch

from dinov2_core.training.random_state import RandomState, seed_step, step_seed


def test_seeds_of_neighbours_differ() -> None:
    seeds = {
        step_seed(seed, step=step, rank=rank)
        for seed in range(4)
        for step in range(50)
        for rank in range(4)
    }
    assert len(seeds) == 800
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_a_step_draws_the_same_whatever_came_before() -> None:
    seed_step(0, step=7, rank=0)
    first = torch.randperm(100)
    torch.rand(10)
    seed_step(0, step=7, rank=0)
    assert torch.equal(torch.randperm(100), first)


def test_a_restored_state_draws_again() -> None:
    state = RandomState.now(torch.device("cpu"))
    first = torch.randperm(100)
    torch.rand(3)
    state.restore()
    assert torch.equal(torch.randperm(100), first)
