"""together: one rank's failure is everybody's, with its words."""

from __future__ import annotations

import pytest

from dinov2_core.distributed.mesh import process_group
from dinov2_core.distributed.together import Together


def fail() -> int:
    raise OSError("no room")


def test_results_come_in_the_order_of_ranks_and_only_of_those_that_work() -> None:
    with process_group():
        together = Together(None, complaint=ValueError)
        assert together(lambda: 3) == [3]
        assert together(fail, works=False) == []


def test_a_failure_is_told_with_its_rank() -> None:
    with process_group(), pytest.raises(ValueError, match="^rank 0: OSError: no room$"):
        Together(None, complaint=ValueError)(fail)
