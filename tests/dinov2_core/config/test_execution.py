"""execution: a kept checkpoint is one that is written."""

from __future__ import annotations

import pytest

from dinov2_core.config.execution import Checkpoints, Execution


def test_nothing_is_saved_by_default() -> None:
    assert Execution().recomputes_activations == "none"
    assert not Execution().compiles_blocks
    assert not Execution().pads_masked_patches


def test_kept_checkpoints_must_be_written() -> None:
    message = "keep_every_steps 500 is no multiple of every_steps 200"
    with pytest.raises(ValueError, match=message):
        Checkpoints(every_steps=200, keep_every_steps=500)


@pytest.mark.parametrize("ratio", [0.08, 0.5, 1.0, 1e-6])
def test_a_shorter_run_has_as_many_checkpoints(ratio: float) -> None:
    compressed = Checkpoints(every_steps=3750, keep_last=2, keep_every_steps=37_500).compressed(
        ratio
    )
    assert compressed.every_steps == max(1, round(3750 * ratio))
    assert compressed.keep_every_steps == 10 * compressed.every_steps
    assert compressed.keep_last == 2
    assert Checkpoints().compressed(ratio).keep_every_steps is None
