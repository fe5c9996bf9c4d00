"""URIs: a path, or an s3:// URI and the path in this node's cache that stands for it."""

from __future__ import annotations

import os
import re
from pathlib import Path

from dinov2_core.errors import SettingsError

SCHEME = "s3://"
_BUCKET = re.compile(r"[\w.-]{3,255}")
_PASSWORD = re.compile(r"//[^/\s]*@")
CACHE_VARIABLE = "DINOPIPE_CACHE"
"""Environment variable that names the cache: a directory of this node, shared with no other."""
FORMER_CACHE_VARIABLE = "DINOPIPE_SPOOL"
"""Its earlier name, still read."""


def is_remote(uri: str) -> bool:
    """Whether a URI names an object store rather than a path."""
    return uri.startswith(SCHEME)


def join_uri(uri: str, *names: str) -> str:
    """The path or URI below another one."""
    return "/".join((uri.rstrip("/"), *names))


def bucket_and_key(uri: str) -> tuple[str, str]:
    """The two parts of an s3:// URI; a key may hold any character, `#` and `?` too."""
    bucket, _, key = uri.removeprefix(SCHEME).partition("/")
    return bucket, key


def cache_directory() -> Path:
    """Directory that holds on this node what lies in object stores."""
    named = os.environ.get(CACHE_VARIABLE) or os.environ.get(FORMER_CACHE_VARIABLE)
    return Path(named) if named else Path.home() / ".cache" / "dinopipe"


def local_path(uri: str) -> Path:
    """Path of a URI on this node: a path is its own, an s3:// URI has one in the cache.

    Raises:
        SettingsError: The URI has no bucket, or leads out of the cache.
    """
    if not is_remote(uri):
        return Path(uri)
    bucket, key = bucket_and_key(uri)
    parts = key.split("/")
    if not _BUCKET.fullmatch(bucket) or ".." in (bucket, *parts):
        raise SettingsError(
            f"{without_password(uri)} names nothing in a bucket; write s3://BUCKET/PREFIX"
        )
    return cache_directory().joinpath(bucket, *parts)


def without_password(text: str) -> str:
    """A text in which no address holds a user's name and password."""
    return _PASSWORD.sub("//", text)
