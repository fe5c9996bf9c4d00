"""The only door to boto3: objects of any S3 endpoint, verified on the way in and out.

Endpoint and credentials come from the environment, the pod's role or a mounted file, as boto3
finds them. Every object that is written carries the sha256 of its bytes.
"""

from __future__ import annotations

import hashlib
import logging
import os
import random
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import boto3
from boto3.exceptions import Boto3Error
from boto3.s3.transfer import TransferConfig
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    NoCredentialsError,
    PartialCredentialsError,
)

from components.runtime.uris import SCHEME, bucket_and_key
from dinov2_core.errors import ObjectUnreadable

logger = logging.getLogger(__name__)

ATTEMPTS = 4
"""How often an object is sent or fetched before giving up, beside the client's own retries."""
PART_BYTES = 32 * 2**20
"""Objects larger than this go in parts of this size, several at a time."""
SHA256 = "sha256"
ABSENT = ("404", "NoSuchKey", "NotFound")
REFUSED = ("412", "PreconditionFailed", "409", "ConditionalRequestConflict")
NOT_IMPLEMENTED = "501"
EXPIRED = ("ExpiredToken", "ExpiredTokenException", "RequestExpired", "InvalidAccessKeyId")
TRANSIENT = ("RequestTimeout", "SlowDown", "InternalError", "BadDigest", "IncompleteBody")
FAILURES = (BotoCoreError, ClientError, Boto3Error, ConnectionError, TimeoutError)
_LOCK = threading.Lock()
_T = TypeVar("_T")


class StorageError(ValueError):
    """A place could not be listed or reached; the message says which and what to do."""


class StoreUnreachable(StorageError):
    """The store does not answer, or not as it should; later it may."""


class ObjectTaken(Exception):
    """An object was not written: another one is in its place."""


class _Damaged(Exception):
    """What arrived is not what was sent."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteObject:
    """One object as the store describes it."""

    uri: str
    size_bytes: int
    etag: str
    """Changes whenever the object is replaced."""
    sha256: str = ""
    """Of its bytes; empty in listings, and for objects that others wrote."""


def objects_with_prefix(uri: str) -> list[RemoteObject]:
    """Objects whose URI begins so.

    Raises:
        StorageError: No credentials, no such bucket, no permission, no connection.
    """
    bucket, prefix = bucket_and_key(uri)
    try:
        pages = _client().get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
        return [
            RemoteObject(
                uri=f"{SCHEME}{bucket}/{entry['Key']}",
                size_bytes=entry["Size"],
                etag=entry["ETag"],
            )
            for page in pages
            for entry in page.get("Contents", [])
        ]
    except FAILURES as error:
        raise _explained(error, uri) from error


def find(uri: str) -> RemoteObject | None:
    """The object of a URI; None where there is none.

    Raises:
        StorageError: As for `objects_with_prefix`.
    """
    bucket, key = bucket_and_key(uri)
    try:
        head = _client().head_object(Bucket=bucket, Key=key)
    except FAILURES as error:
        if _code(error) in ABSENT:
            return None
        raise _explained(error, uri) from error
    return RemoteObject(
        uri=uri,
        size_bytes=head["ContentLength"],
        etag=head["ETag"],
        sha256=head["Metadata"].get(SHA256, ""),
    )


def read(uri: str) -> bytes:
    """Bytes of one small object.

    Raises:
        ObjectUnreadable: The store refuses this object, or it is damaged.
        StorageError: The store does not answer, or there are no credentials.
    """
    bucket, key = bucket_and_key(uri)

    def once() -> bytes:
        answer = _client().get_object(Bucket=bucket, Key=key)
        content: bytes = answer["Body"].read()
        known = answer.get("Metadata", {}).get(SHA256)
        if known and hashlib.sha256(content).hexdigest() != known:
            raise _Damaged("its bytes are not those that were written")
        return content

    try:
        return _repeated(once, uri)
    except StorageError as error:
        if isinstance(error.__cause__, ClientError | _Damaged):
            raise ObjectUnreadable(str(error)) from error
        raise


def read_range(found: RemoteObject, *, start: int, size: int) -> bytes:
    """Some bytes of an object, as long as it is the one that was found.

    Raises:
        ObjectUnreadable: It was removed or replaced meanwhile, or may not be read.
        StorageError: The store does not answer, or there are no credentials.
    """
    bucket, key = bucket_and_key(found.uri)
    part = f"bytes={start}-{start + size - 1}"

    def once() -> bytes:
        answer = _client().get_object(Bucket=bucket, Key=key, Range=part, IfMatch=found.etag)
        content: bytes = answer["Body"].read()
        return content

    try:
        return _repeated(once, found.uri)
    except StorageError as error:
        if _code(error.__cause__) in REFUSED:
            raise ObjectUnreadable(f"{found.uri} was replaced while it was read") from error
        if isinstance(error.__cause__, ClientError):
            raise ObjectUnreadable(str(error)) from error
        raise


def write(uri: str, content: bytes, *, replaces: str | None = None) -> str:
    """Write one small object; gives its etag.

    Args:
        uri: Of the object.
        content: Its bytes.
        replaces: Etag of the object that may be replaced, "" if there must be none; None
            replaces anything, and so does all else on a store that knows no conditions.

    Raises:
        ObjectTaken: Another object is there than the one that may be replaced.
        StorageError: It cannot be written.
    """
    bucket, key = bucket_and_key(uri)
    condition: dict[str, str] = {}
    if replaces is not None:
        condition = {"IfMatch": replaces} if replaces else {"IfNoneMatch": "*"}
    metadata = {SHA256: hashlib.sha256(content).hexdigest()}

    def once() -> str:
        answer = _client().put_object(
            Bucket=bucket, Key=key, Body=content, Metadata=metadata, **condition
        )
        return _checked(uri, size_bytes=len(content), etag=answer["ETag"])

    try:
        return _repeated(once, uri)
    except StorageError as error:
        code = _code(error.__cause__)
        if condition and code in (*REFUSED, *ABSENT):
            raise ObjectTaken(uri) from error
        if condition and code == NOT_IMPLEMENTED:
            return write(uri, content)
        raise


def upload(path: Path, uri: str) -> str:
    """Send a file of any size; gives the object's etag. The file must not change meanwhile.

    Raises:
        StorageError: It cannot be written.
    """
    bucket, key = bucket_and_key(uri)
    with path.open("rb") as file:
        metadata = {SHA256: hashlib.file_digest(file, "sha256").hexdigest()}
    size = path.stat().st_size

    def once() -> str:
        _client().upload_file(
            str(path), bucket, key, ExtraArgs={"Metadata": metadata}, Config=_transfer()
        )
        return _checked(uri, size_bytes=size)

    return _repeated(once, uri)


def download(uri: str, path: Path) -> str:
    """Fetch an object; the file appears whole or not at all. Gives the object's etag.

    Raises:
        ObjectUnreadable: There is no such object, or it stays damaged.
        StorageError: The store does not answer, or there are no credentials.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")

    def once() -> str:
        found = find(uri)
        if found is None:
            raise ObjectUnreadable(f"{uri} does not exist")
        bucket, key = bucket_and_key(uri)
        _client().download_file(bucket, key, str(partial), Config=_transfer())
        _verify(partial, found)
        return found.etag

    try:
        etag = _repeated(once, uri)
        partial.replace(path)
        return etag
    except StorageError as error:
        if isinstance(error.__cause__, _Damaged):
            raise ObjectUnreadable(str(error)) from error
        raise
    finally:
        partial.unlink(missing_ok=True)


def delete(uris: list[str]) -> None:
    """Remove objects; those that are not there are no error.

    Raises:
        StorageError: They cannot be removed.
    """
    for uri in uris:  # one by one: some stores have no bulk removal, or want an MD5 for it
        bucket, key = bucket_and_key(uri)
        try:
            _client().delete_object(Bucket=bucket, Key=key)
        except FAILURES as error:
            if _code(error) not in ABSENT:
                raise _explained(error, uri) from error


def _verify(path: Path, expected: RemoteObject) -> None:
    size = path.stat().st_size
    if size != expected.size_bytes:
        raise _Damaged(f"{size} of {expected.size_bytes} bytes arrived")
    if not expected.sha256:
        return
    with path.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != expected.sha256:
            raise _Damaged("its bytes are not those that were written")


def _checked(uri: str, *, size_bytes: int, etag: str = "") -> str:
    """The etag of what was just written, if all of it is there."""
    found = find(uri)
    if found is None or found.size_bytes != size_bytes:
        there = found.size_bytes if found else 0
        raise _Damaged(f"{there} of {size_bytes} bytes are there")
    return etag or found.etag


def _repeated(work: Callable[[], _T], uri: str) -> _T:
    """Do it until it is done, with growing pauses; what waiting does not heal fails at once."""
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return work()
        except ObjectUnreadable:
            raise
        except (*FAILURES, _Damaged) as error:
            if _code(error) in EXPIRED:
                _cached_client.cache_clear()
            if attempt == ATTEMPTS or not _may_heal(error):
                raise _explained(error, uri) from error
            logger.debug("%s: attempt %d failed (%s)", uri, attempt, error)
            time.sleep(random.uniform(0.5, 1.0) * 2 ** (attempt - 1))
    raise AssertionError(ATTEMPTS)


def _may_heal(error: Exception) -> bool:
    """Whether the same request may succeed a moment later."""
    if isinstance(error, NoCredentialsError | PartialCredentialsError):
        return False
    code = _code(error)
    if code == NOT_IMPLEMENTED:
        return False
    return not code or code in (*EXPIRED, *TRANSIENT) or code.startswith("5")


def _code(error: BaseException | None) -> str:
    """What the store answered, the number for server errors; empty where it did not answer."""
    if isinstance(error, Boto3Error):  # the transfer's wrapper
        error = error.__context__
    if not isinstance(error, ClientError):
        return ""
    status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    return str(status) if status >= 500 else str(error.response["Error"].get("Code", "unknown"))


def _explained(error: Exception, uri: str) -> StorageError:
    if isinstance(error, NoCredentialsError | PartialCredentialsError):
        return StorageError(
            f"no S3 credentials for {uri}; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, "
            f"AWS_PROFILE, or give the pod a role (never in the spec)"
        )
    if isinstance(error, _Damaged):
        return StoreUnreachable(
            f"{uri} was damaged on the way {ATTEMPTS} times ({error}); check the network and "
            "whatever lies between here and the store"
        )
    code = _code(error)
    if code == "NoSuchBucket":
        bucket = bucket_and_key(uri)[0]
        return StorageError(f"S3 answered {code} for {uri}; create the bucket {bucket} first")
    if code in ("403", "AccessDenied", "SignatureDoesNotMatch", *EXPIRED):
        return StorageError(
            f"S3 answered {code} for {uri}; check the credentials, and that they may list, read, "
            "write and delete there"
        )
    if code.startswith("5"):
        return StoreUnreachable(f"S3 answered {code} for {uri}; see that the store is well")
    if code:
        return StorageError(f"S3 answered {code} for {uri}; check bucket, prefix and permissions")
    told = re.sub(r"//[^/@\s]*@", "//", str(error))  # an endpoint may hold a password
    return StoreUnreachable(
        f"S3 is not reachable for {uri} ({told}); check AWS_ENDPOINT_URL and the network"
    )


def _transfer() -> TransferConfig:
    return TransferConfig(
        multipart_threshold=PART_BYTES, multipart_chunksize=PART_BYTES, max_concurrency=8
    )


def _client() -> Any:
    """The client of this process and of the environment as it is now."""
    names = sorted(name for name in os.environ if name.startswith("AWS_"))
    with _LOCK:  # sessions are not made by two threads at a time
        return _cached_client(os.getpid(), *(f"{name}={os.environ[name]}" for name in names))


@lru_cache(maxsize=4)
def _cached_client(*_identity: int | str) -> Any:
    settings = Config(
        retries={"max_attempts": 5, "mode": "standard"},
        connect_timeout=5,
        read_timeout=30,
        max_pool_connections=16,
    )
    return boto3.Session().client("s3", config=settings)
