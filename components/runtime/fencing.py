"""Fencing: prefixes of a store that this process must not write to any more."""

from __future__ import annotations

from dinov2_core.errors import LeaseLost

_fenced: dict[str, str] = {}
"""Reason by prefix."""


def fence(prefix: str, *, reason: str) -> None:
    """Let every further write below a prefix raise LeaseLost."""
    _fenced[prefix.rstrip("/")] = reason


def lift_fence(prefix: str) -> None:
    """Allow writes below a prefix again: this process has its lease."""
    _fenced.pop(prefix.rstrip("/"), None)


def check_fence(uri: str) -> None:
    """Make sure that an object may be written or removed.

    Raises:
        LeaseLost: It lies below a fenced prefix.
    """
    for prefix, reason in tuple(_fenced.items()):
        if uri == prefix or uri.startswith(prefix + "/"):
            raise LeaseLost(reason)
