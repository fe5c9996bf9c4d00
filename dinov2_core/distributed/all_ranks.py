"""all_ranks_or_raise: work that succeeds on every rank, or fails on every rank."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar, cast

import torch.distributed as dist

logger = logging.getLogger(__name__)

_T = TypeVar("_T")


def all_ranks_or_raise(
    work: Callable[[], _T],
    *,
    error: Callable[[str], Exception],
    group: dist.ProcessGroup | None = None,
    participates: bool = True,
) -> list[_T]:
    """Do some work on several ranks; also a barrier. Collective.

    Args:
        work: What a rank that participates does.
        error: Makes the exception that all ranks raise from the failures of any rank.
        group: All ranks, for the exchange of results; None is the default group.
        participates: Whether this rank works.

    Returns:
        Results of the participating ranks in their order, on every rank.
    """
    result, failure = None, ""
    if participates:
        try:
            result = work()
        except Exception as raised:
            logger.warning("rank %d failed", dist.get_rank(), exc_info=True)
            failure = f"{type(raised).__name__}: {raised}"
    outcomes: list[tuple[bool, _T | None, str]] = [(False, None, "")] * dist.get_world_size()
    dist.all_gather_object(outcomes, (participates, result, failure), group=group)
    failures = [f"rank {rank}: {text}" for rank, (_, _, text) in enumerate(outcomes) if text]
    if failures:
        raise error("; ".join(failures))
    return [cast("_T", result) for has_worked, result, _ in outcomes if has_worked]
