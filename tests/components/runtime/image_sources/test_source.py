"""What all sources share."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from components.runtime.image_sources.folder import FolderSource
from components.runtime.image_sources.source import (
    MAX_IMAGE_BYTES,
    StoredObject,
    check_size,
    content_digest,
    folder_label,
)
from dinov2_core.data.decoding import MAX_PIXELS
from dinov2_core.errors import ObjectUnreadable


def stored(key: str, *, etag: str = "") -> StoredObject:
    return StoredObject(key=key, uri=f"/images/{key}", size_bytes=7, etag=etag)


def test_the_largest_image_of_16_bit_colours_may_be_read() -> None:
    check_size("a.tiff", 6 * MAX_PIXELS + 10**6)
    check_size("a.tiff", MAX_IMAGE_BYTES)
    with pytest.raises(ObjectUnreadable, match="a.tiff has 671088641 bytes"):
        check_size("a.tiff", MAX_IMAGE_BYTES + 1)


def test_a_class_is_the_first_folder() -> None:
    labels = [folder_label(stored(key)) for key in ("cat/1.png", "cat/x/2.png", "README")]
    assert labels == ["cat", "cat", None]


def test_content_is_known_by_its_store_or_by_its_bytes(tmp_path: Path) -> None:
    (tmp_path / "1.png").write_bytes(b"content")
    source = FolderSource(str(tmp_path))
    (item,) = source.objects()
    assert content_digest(source, item) == hashlib.sha256(b"content").hexdigest()
    (tmp_path / "1.png").unlink()
    assert content_digest(source, item) == "unreadable"
    assert content_digest(source, stored("1.png", etag="abc")) == "7-abc"
