"""Dropped paths as a function of (seed, step, rank), so that no random state is saved."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor


def step_seed(seed: int, *, step: int, rank: int) -> int:
    """A 63-bit seed, unrelated for neighbouring seeds, steps and ranks."""
    digest = hashlib.sha256(f"step {seed} {step} {rank}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def seed_step(seed: int, *, step: int, rank: int) -> None:
    """Restart torch's default generators before a step.

    Stochastic depth draws from them. What a step draws depends on nothing before it: resuming
    needs no saved state, and continues bit for bit when the number of ranks is the same. Order,
    crops and masks have streams of their own and do not depend on the rank count either.
    """
    torch.manual_seed(step_seed(seed, step=step, rank=rank))


@dataclass(frozen=True, slots=True, kw_only=True)
class RandomState:
    """State of torch's default generators, so that a forward pass can be repeated exactly."""

    device: torch.device
    """Whose generator it is besides the CPU's."""
    cpu: Tensor
    """State of the CPU's generator."""
    cuda: Tensor | None
    """State of the CUDA device's generator, if it is one."""

    @classmethod
    def now(cls, device: torch.device) -> RandomState:
        """The present state."""
        cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        return cls(device=device, cpu=torch.get_rng_state(), cuda=cuda)

    def restore(self) -> None:
        """Draw again from here."""
        torch.set_rng_state(self.cpu)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda, self.device)
