"""What every source of images offers: objects in a fixed order, their bytes and their labels."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from dinov2_core.errors import ObjectUnreadable

MAX_IMAGE_BYTES = 640 * 2**20
"""Objects with more bytes are refused unread; 16-bit colours of the most pixels that are decoded
(`dinov2_core.data.decoding.MAX_PIXELS`) take less without any compression."""

UNREADABLE = "unreadable"
"""Stands for the content of an object that cannot be read."""

Label = str | int


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredObject:
    """One object of a source."""

    key: str
    """Path below the source's root, with forward slashes; unique in the source, always UTF-8."""
    uri: str
    """What messages and tables call it."""
    size_bytes: int
    """0 where only reading would tell."""
    etag: str = ""
    """Identifies the content in its store; empty for local files."""


class ImageSource(Protocol):
    """Objects that may be images; `read` is called from several threads."""

    def objects(self) -> Sequence[StoredObject]:
        """All objects, ordered by key.

        Raises:
            InputError: There is nothing of that name, or it cannot be listed.
            AccessRefused: The store refuses it.
            TransientError: The store does not answer.
        """
        ...

    def read(self, item: StoredObject) -> bytes:
        """Bytes of one object.

        Raises:
            ObjectUnreadable: This object cannot be read; the others may be fine.
            AccessRefused: The store refuses it.
            TransientError: The store does not answer.
        """
        ...

    def labels(self, items: Sequence[StoredObject]) -> Sequence[Label | None]:
        """The class of each object that `objects` gave; None for one beside the classes.

        Raises:
            InputError: The source has no classes, or an empty one.
        """
        ...


def folder_label(item: StoredObject) -> str | None:
    """The first folder of an object's key; None for an object that lies in no folder."""
    folder, slash, _ = item.key.partition("/")
    return folder if slash else None


def check_size(uri: str, size_bytes: int) -> None:
    """Refuse to read what is too large for an image.

    Raises:
        ObjectUnreadable: It has more than `MAX_IMAGE_BYTES`.
    """
    if size_bytes > MAX_IMAGE_BYTES:
        raise ObjectUnreadable(
            f"{uri} has {size_bytes} bytes, more than the {MAX_IMAGE_BYTES} that an image may have"
        )


def content_digest(source: ImageSource, item: StoredObject) -> str:
    """Identifies an object's content: what its store says of it, or the sha256 of its bytes."""
    if item.etag:
        return f"{item.size_bytes}-{item.etag}"
    try:
        return hashlib.sha256(source.read(item)).hexdigest()
    except (ObjectUnreadable, OSError):
        return UNREADABLE
