"""Places: a path, or an s3:// URI with the spool directory on this machine that stands for it."""

from __future__ import annotations

import os
import re
from pathlib import Path

SCHEME = "s3://"
_BUCKET = re.compile(r"[\w.-]{3,255}")
CACHE_VARIABLE = "DINOPIPE_SPOOL"
"""Environment variable that names the spool: a directory of this node, shared with no other."""


def is_remote(uri: str) -> bool:
    """Whether a URI names an object store rather than a path."""
    return uri.startswith(SCHEME)


def join_uri(uri: str, *names: str) -> str:
    """The place below a path or a URI."""
    return "/".join((uri.rstrip("/"), *names))


def bucket_and_key(uri: str) -> tuple[str, str]:
    """The two parts of an s3:// URI; a key may hold any character, `#` and `?` too."""
    bucket, _, key = uri.removeprefix(SCHEME).partition("/")
    return bucket, key


def cache_directory() -> Path:
    """Directory that holds on this node what lies in object stores."""
    return Path(os.environ.get(CACHE_VARIABLE) or Path.home() / ".cache" / "dinopipe")


def local_path(uri: str) -> Path:
    """Where a place is on this node: a path is its own, a URI has one in the spool.

    Raises:
        ValueError: The URI has no bucket, or leads out of the spool.
    """
    if not is_remote(uri):
        return Path(uri)
    bucket, key = bucket_and_key(uri)
    parts = key.split("/")
    if not _BUCKET.fullmatch(bucket) or ".." in (bucket, *parts):
        shown = re.sub("//[^/]*@", "//", uri)  # no secret belongs here, and none is told
        raise ValueError(f"{shown} names no place in a bucket; write s3://BUCKET/PREFIX")
    return cache_directory().joinpath(bucket, *parts)
