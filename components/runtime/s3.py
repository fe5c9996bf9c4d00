"""The only user of boto3: objects of any S3 endpoint, verified on the way in.

Endpoint and credentials come from the environment, the pod's role or a mounted file, as boto3
finds them. botocore checks what it sends and repeats single requests and parts; the retry policy
repeats what still fails. Each object is written with the sha256 of its bytes: botocore verifies
nothing that it fetches in ranges, and many stores keep none of its checksums.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import boto3
from boto3.exceptions import Boto3Error
from boto3.s3.transfer import TransferConfig
from botocore import exceptions as boto
from botocore.config import Config

from components.runtime.fencing import check_fence
from components.runtime.manifests import digest_of_file
from components.runtime.retry import QUICK, current_policy, retried
from components.runtime.uris import SCHEME, bucket_and_key, without_password
from dinov2_core.errors import DinopipeError, ObjectUnreadable, StoreRefused, StoreUnavailable

PART_BYTES = 32 * 2**20
"""Objects larger than this go in parts of this size, several at a time."""
DOWNLOADS = 3
"""How often an object may arrive damaged before it counts as unreadable."""
SHA256 = "sha256"
ABSENT = ("404", "NoSuchKey", "NotFound")
CONDITION_FAILED = ("412", "PreconditionFailed", "409", "ConditionalRequestConflict")
EXPIRED = ("ExpiredToken", "ExpiredTokenException", "RequestExpired")
DENIED = ("403", "AccessDenied")
TRANSIENT = ("429", "BadDigest", "IncompleteBody", "RequestTimeout", "SlowDown", "Throttling")
"""Answers, beside those from 500 on, after which the same request may succeed."""
FAILURES = (boto.BotoCoreError, boto.ClientError, Boto3Error, ConnectionError, TimeoutError)
"""What boto3 raises."""
NO_CREDENTIALS = (boto.NoCredentialsError, boto.PartialCredentialsError)
NO_METADATA = (boto.CredentialRetrievalError, boto.MetadataRetrievalError)
NO_CONNECTION = (boto.ConnectionError, boto.HTTPClientError, boto.IncompleteReadError, OSError)
DAMAGE = (boto.ChecksumError, boto.FlexibleChecksumError)
_LOCK = threading.Lock()
_T = TypeVar("_T")


class ObjectTaken(Exception):
    """An object was not written: another one is in its place."""


class _Damaged(Exception):
    """What arrived is not what was written."""


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
        StoreRefused: No credentials, no such bucket, no permission.
        StoreUnavailable: The store does not answer, or not as it should.
    """
    bucket, prefix = bucket_and_key(uri)

    def once() -> list[RemoteObject]:
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

    return _request(once, uri)


def find(uri: str) -> RemoteObject | None:
    """The object of a URI; None where there is none.

    Raises:
        StoreRefused, StoreUnavailable: As for `objects_with_prefix`.
    """
    bucket, key = bucket_and_key(uri)
    try:
        head = _request(lambda: _client().head_object(Bucket=bucket, Key=key), uri)
    except ObjectUnreadable:
        return None
    return RemoteObject(
        uri=uri,
        size_bytes=head["ContentLength"],
        etag=head["ETag"],
        sha256=head["Metadata"].get(SHA256, ""),
    )


def read(uri: str) -> bytes:
    """Bytes of one small object.

    Raises:
        ObjectUnreadable: There is no such object, it may not be read, or it is damaged.
        StoreRefused, StoreUnavailable: As for `objects_with_prefix`.
    """
    bucket, key = bucket_and_key(uri)

    def once() -> bytes:
        answer = _client().get_object(Bucket=bucket, Key=key)
        content: bytes = answer["Body"].read()
        known = answer.get("Metadata", {}).get(SHA256)
        if known and hashlib.sha256(content).hexdigest() != known:
            raise _Damaged("its bytes are not those that were written")
        return content

    return _undamaged(once, uri)


def download(uri: str, path: Path) -> str:
    """Fetch an object; the file appears whole or not at all. Gives the object's etag.

    Raises:
        ObjectUnreadable: There is no such object, it may not be read, or it is damaged.
        StoreRefused, StoreUnavailable: As for `objects_with_prefix`.
    """
    bucket, key = bucket_and_key(uri)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")

    def once() -> str:
        head = _client().head_object(Bucket=bucket, Key=key)
        _client().download_file(bucket, key, str(partial), Config=_transfer())
        known = head["Metadata"].get(SHA256)
        if known and digest_of_file(partial) != known:
            raise _Damaged("its bytes are not those that were written")
        return str(head["ETag"])

    try:
        etag = _undamaged(once, uri)
        partial.replace(path)
        return etag
    finally:
        partial.unlink(missing_ok=True)


def read_range(found: RemoteObject, *, start: int, size: int) -> bytes:
    """Some bytes of an object, as long as it is the one that was found.

    Raises:
        ObjectUnreadable: It was removed or replaced meanwhile, or may not be read.
        StoreRefused, StoreUnavailable: As for `objects_with_prefix`.
    """
    bucket, key = bucket_and_key(found.uri)
    part = f"bytes={start}-{start + size - 1}"

    def once() -> bytes:
        try:
            answer = _client().get_object(Bucket=bucket, Key=key, Range=part, IfMatch=found.etag)
        except boto.ClientError as error:
            if _code(error) in CONDITION_FAILED:
                raise ObjectUnreadable(f"{found.uri} was replaced while it was read") from error
            raise
        content: bytes = answer["Body"].read()
        return content

    return _undamaged(once, found.uri)


def write(uri: str, content: bytes, *, replaces: str | None = None) -> str:
    """Write one small object; gives its etag.

    Args:
        uri: Of the object.
        content: Its bytes.
        replaces: Etag of the object that may be replaced, "" if there must be none; None
            replaces anything, and so does all else on a store that knows no conditions.

    Raises:
        ObjectTaken: Another object is there than the one that may be replaced. It may be this
            one, from an attempt whose answer was lost.
        LeaseLost: Another run works there now.
        StoreRefused, StoreUnavailable: As for `objects_with_prefix`.
    """
    bucket, key = bucket_and_key(uri)
    condition: dict[str, str] = {}
    if replaces is not None:
        condition = {"IfMatch": replaces} if replaces else {"IfNoneMatch": "*"}
    metadata = {SHA256: hashlib.sha256(content).hexdigest()}

    def once() -> str:
        check_fence(uri)
        try:
            answer = _client().put_object(
                Bucket=bucket, Key=key, Body=content, Metadata=metadata, **condition
            )
        except boto.ClientError as error:
            if condition and _code(error) in (*CONDITION_FAILED, *ABSENT):
                raise ObjectTaken(uri) from error
            raise
        return str(answer["ETag"])

    try:
        return _request(once, uri)
    except StoreRefused as error:
        if condition and error.status == 501:
            return write(uri, content)
        raise


def upload(path: Path, uri: str) -> str:
    """Copy a file of any size there; gives the object's etag. The file must not change meanwhile.

    Raises:
        LeaseLost: Another run works there now.
        StoreRefused, StoreUnavailable: As for `objects_with_prefix`.
    """
    bucket, key = bucket_and_key(uri)
    metadata = {SHA256: digest_of_file(path)}

    def once() -> str:
        check_fence(uri)
        _client().upload_file(
            str(path), bucket, key, ExtraArgs={"Metadata": metadata}, Config=_transfer()
        )
        return str(_client().head_object(Bucket=bucket, Key=key)["ETag"])

    return _request(once, uri)


def delete(uris: list[str]) -> None:
    """Remove objects; those that are not there are no error.

    Raises:
        LeaseLost: Another run works there now.
        StoreRefused, StoreUnavailable: As for `objects_with_prefix`.
    """
    for uri in uris:  # one by one: some stores have no bulk removal, or want an MD5 for it
        with suppress(ObjectUnreadable):
            _delete(uri)


def _delete(uri: str) -> None:
    bucket, key = bucket_and_key(uri)
    check_fence(uri)
    _request(lambda: _client().delete_object(Bucket=bucket, Key=key), uri)


def _undamaged(fetch: Callable[[], _T], uri: str) -> _T:
    """What a fetch gives, which may find one object absent, forbidden or damaged."""

    def once() -> _T:
        try:
            return fetch()
        except DAMAGE as error:
            raise _Damaged(str(error)) from error

    for _ in range(DOWNLOADS):
        try:
            return _request(once, uri)
        except _Damaged as error:
            damage = error
        except StoreRefused as error:
            if _code(error.__cause__) in DENIED:
                raise ObjectUnreadable(str(error)) from error
            raise
    raise ObjectUnreadable(
        f"{uri} was damaged on the way {DOWNLOADS} times ({damage}); check the network and "
        "whatever lies between here and the store"
    ) from damage


def _request(call: Callable[[], _T], uri: str) -> _T:
    """What a call of boto3 gives, with errors of ours, repeated while the store is at fault."""

    def once() -> _T:
        try:
            return call()
        except FAILURES as error:
            if _code(error) in EXPIRED:
                _cached_client.cache_clear()  # the next attempt reads the credentials again
            raise explained(error, uri) from error

    return retried(once)


def explained(error: Exception, uri: str) -> DinopipeError:
    """An error of boto3 as one of ours.

    Args:
        error: One of FAILURES.
        uri: What was asked for.
    """
    code = _code(error)
    answered = f"S3 answered {code} for {uri}"
    if isinstance(error, NO_CREDENTIALS):
        return StoreRefused(
            f"no S3 credentials for {uri}; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, "
            f"AWS_PROFILE, or give the pod a role (never in the spec)"
        )
    if not code:
        reason = without_password(str(error))
        if isinstance(error, (*NO_CONNECTION, *NO_METADATA, *DAMAGE, Boto3Error)):
            return StoreUnavailable(
                f"S3 is not reachable for {uri} ({reason}); check AWS_ENDPOINT_URL and the network"
            )
        return StoreRefused(f"S3 cannot be asked for {uri} ({reason}); check the AWS_* variables")
    if code == "501":
        return StoreRefused(f"{answered}; use a store that knows this request", status=501)
    if code in EXPIRED:
        return StoreUnavailable(f"{answered}; renew the credentials")
    if code.startswith("5") or code in TRANSIENT:
        return StoreUnavailable(f"{answered}; see that the store is well")
    if code in ABSENT:
        return ObjectUnreadable(f"{answered}; check bucket, key and permissions")
    if code == "NoSuchBucket":
        return StoreRefused(f"{answered}; create the bucket {bucket_and_key(uri)[0]} first")
    return StoreRefused(
        f"{answered}; check the credentials, and that they may list, read, write and delete there",
        status=403 if code in DENIED else 400,
    )


def _code(error: BaseException | None) -> str:
    """What the store answered, the number for server errors; empty where it did not answer."""
    if isinstance(error, Boto3Error):  # the transfer's wrapper
        error = error.__context__
    if not isinstance(error, boto.ClientError):
        return ""
    status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    if status >= 500 or status == 429:
        return str(status)
    return str(error.response["Error"].get("Code") or status)


def _transfer() -> TransferConfig:
    return TransferConfig(
        multipart_threshold=PART_BYTES, multipart_chunksize=PART_BYTES, max_concurrency=8
    )


def _client() -> Any:
    """The client of this process and of the environment as it is now."""
    names = sorted(name for name in os.environ if name.startswith("AWS_"))
    is_quick = current_policy() is QUICK
    with _LOCK:  # sessions are not made by two threads at a time
        return _cached_client(
            is_quick, os.getpid(), *(f"{name}={os.environ[name]}" for name in names)
        )


@lru_cache(maxsize=4)
def _cached_client(is_quick: bool, *_identity: int | str) -> Any:
    settings = Config(
        retries={"total_max_attempts": 1 if is_quick else 5, "mode": "standard"},
        connect_timeout=2 if is_quick else 5,
        read_timeout=5 if is_quick else 30,
        max_pool_connections=16,
    )
    try:
        return boto3.Session().client("s3", config=settings)
    except ValueError as error:  # botocore's own class for an address that is none
        raise StoreRefused(
            f"{without_password(str(error))}; set AWS_ENDPOINT_URL to http(s)://HOST[:PORT], and "
            "AWS_REGION to the store's"
        ) from error
