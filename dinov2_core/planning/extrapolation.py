"""What a step of a deep model takes, from steps of two shallow ones: all blocks are equal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from dinov2_core.planning.cost_tracker import CostTracker, Segment


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTrace:
    """What was counted of one step."""

    segments: tuple[Segment, ...]
    """In order of time."""
    flops: Mapping[str, int]
    moved_bytes: int
    sent_bytes: Mapping[str, int]
    calls: Mapping[str, int]

    @classmethod
    def of(cls, tracker: CostTracker) -> StepTrace:
        """What was counted since the tracker's last restart."""
        return cls(
            segments=tuple(tracker.segments),
            flops=dict(tracker.flops),
            moved_bytes=tracker.moved_bytes,
            sent_bytes=dict(tracker.sent),
            calls=dict(tracker.calls),
        )


def extrapolated(shallow: StepTrace, deeper: StepTrace, *, num_more: int) -> StepTrace:
    """The trace of a model with more blocks.

    Every count grows by the same amount with each block. So does what is held in a segment that
    stays as many blocks away from the first block, or from the last. Those near both ends are kept:
    in the ones between, memory changes by the same amount from block to block, so that the highest
    lies at an end.

    Args:
        shallow: Trace of a model that has enough blocks for the middle ones to be alike.
        deeper: The same with one block more.
        num_more: Blocks of the result beyond those of `shallow`.

    Raises:
        ValueError: The segments of the two traces do not correspond.
    """

    def grown(low: Mapping[str, int], high: Mapping[str, int]) -> dict[str, int]:
        keys = dict.fromkeys((*low, *high))
        return {key: _grown(low.get(key, 0), high.get(key, 0), num_more) for key in keys}

    segments = tuple(
        Segment(
            low.purpose,
            _grown(low.peak_bytes, high.peak_bytes, num_more),
            grown(low.memory_bytes, high.memory_bytes),
        )
        for low, high in _corresponding(shallow.segments, deeper.segments)
    )
    return StepTrace(
        segments=segments,
        flops=grown(shallow.flops, deeper.flops),
        moved_bytes=_grown(shallow.moved_bytes, deeper.moved_bytes, num_more),
        sent_bytes=grown(shallow.sent_bytes, deeper.sent_bytes),
        calls=grown(shallow.calls, deeper.calls),
    )


def _grown(low: int, high: int, num_more: int) -> int:
    return low + num_more * (high - low)


def _corresponding(
    shallow: Sequence[Segment], deeper: Sequence[Segment]
) -> Iterator[tuple[Segment, Segment]]:
    """Segments at equal distance from the start, then from the end, of the same phase.

    A phase is a run of segments with one purpose. In one that has a segment for each block, the
    last two are not counted from the start, nor the first two from the end: there a block is not
    followed, or preceded, by another one whose parameters or gradients are held as well.
    """
    phases = [_phases(segments) for segments in (shallow, deeper)]
    if len(phases[0]) != len(phases[1]):
        raise ValueError(f"{len(phases[0])} phases do not correspond to {len(phases[1])}")
    for low, high in zip(*phases, strict=True):
        if len(low) == len(high):
            yield from zip(low, high, strict=True)
            continue
        kept = len(low) - 2
        yield from zip(low[:kept], high[:kept], strict=True)
        yield from zip(low[-kept:], high[-kept:], strict=True)


def _phases(segments: Sequence[Segment]) -> list[list[Segment]]:
    return [list(run) for _, run in groupby(segments, key=lambda segment: segment.purpose)]
