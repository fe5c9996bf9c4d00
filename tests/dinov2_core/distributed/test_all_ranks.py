"""all_ranks: one rank's failure is raised on every rank, with its message."""

from __future__ import annotations

import logging

import pytest

from dinov2_core.distributed.all_ranks import all_ranks_or_raise
from dinov2_core.distributed.mesh import process_group


def fail() -> int:
    raise OSError("no room")


def test_results_are_those_of_the_participating_ranks() -> None:
    with process_group():
        assert all_ranks_or_raise(lambda: 3, error=ValueError) == [3]
        assert all_ranks_or_raise(fail, error=ValueError, participates=False) == []


def test_a_failure_names_its_rank_and_is_logged_there_with_its_traceback(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with (
        caplog.at_level(logging.WARNING),
        process_group(),
        pytest.raises(ValueError, match="^rank 0: OSError: no room$"),
    ):
        all_ranks_or_raise(fail, error=ValueError)
    assert "rank 0 failed" in caplog.text
    assert 'raise OSError("no room")' in caplog.text
