"""Together: what ranks do at the same time either works on all of them or fails on all."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar, cast

import torch.distributed as dist

logger = logging.getLogger(__name__)

_T = TypeVar("_T")


class Together:
    """Does a part of the work on every rank and fails on all of them if it fails on one.

    Args:
        group: All ranks, for what they tell each other; None is the default group.
        complaint: Makes the error that all ranks raise from what the failing ones say.
    """

    def __init__(
        self, group: dist.ProcessGroup | None, *, complaint: Callable[[str], Exception]
    ) -> None:
        self._group = group
        self._complaint = complaint

    def __call__(self, work: Callable[[], _T], *, works: bool = True) -> list[_T]:
        """Results of the ranks that work, on every rank; also a barrier."""
        outcome: tuple[bool, _T | None, str] = (False, None, "")
        if works:
            try:
                outcome = (True, work(), "")
            except Exception as error:
                logger.debug("failed here", exc_info=True)
                outcome = (True, None, f"{type(error).__name__}: {error}")
        outcomes = [outcome for _ in range(dist.get_world_size())]
        dist.all_gather_object(outcomes, outcome, group=self._group)
        failures = [f"rank {n}: {text}" for n, (_, _, text) in enumerate(outcomes) if text]
        if failures:
            raise self._complaint("; ".join(failures))
        return [cast("_T", result) for has_worked, result, _ in outcomes if has_worked]
