"""s3: objects arrive whole or not at all, over lines that are not."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import boto3
import pytest

from components.runtime import s3 as door
from components.runtime.retry import QUICK, RetryPolicy, retrying_with
from components.runtime.s3 import ObjectTaken
from dinov2_core.errors import (
    DinopipeError,
    ObjectUnreadable,
    StoreRefused,
    StoreUnavailable,
    UserError,
)
from tests.s3_server import BadLine

URI = "s3://pile/folder/object"


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts as small as a server takes them, and no pauses."""
    monkeypatch.setattr(door, "PART_BYTES", 5 * 2**20)
    monkeypatch.setattr("time.sleep", lambda seconds: None)


@pytest.fixture(autouse=True)
def patient() -> Iterator[None]:
    with retrying_with(RetryPolicy(total_seconds=20, first_pause_seconds=0.01)):
        yield


@pytest.fixture
def large(tmp_path: Path) -> Path:
    path = tmp_path / "large"
    path.write_bytes(os.urandom(12 * 2**20))  # three parts
    return path


def puts(method: str, path: str) -> bool:
    return method == "PUT" and "/folder/" in path


def gets(method: str, path: str) -> bool:
    return method == "GET" and "/folder/" in path


def test_a_large_file_goes_in_parts_and_comes_back(s3: str, large: Path, tmp_path: Path) -> None:
    etag = door.upload(large, URI)
    assert etag.endswith('-3"')
    assert door.download(URI, tmp_path / "back") == etag
    assert (tmp_path / "back").read_bytes() == large.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "large"]


@pytest.mark.parametrize("fault", ["drop", "answer 503"])
def test_a_part_that_breaks_is_uploaded_again(
    s3: str, large: Path, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with BadLine(s3, faults=[fault] * 3, concerns=puts).open(monkeypatch) as line:
        door.upload(large, URI)
        assert not line.faults
    found = door.find(URI)
    assert found is not None
    assert found.size_bytes == large.stat().st_size
    body = boto3.client("s3").get_object(Bucket="pile", Key="folder/object")["Body"].read()
    assert body == large.read_bytes()


def test_an_upload_that_never_arrives_leaves_nothing(
    s3: str, large: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = BadLine(s3, faults=["answer 503"] * 999, concerns=puts)
    unavailable = pytest.raises(StoreUnavailable, match="S3 answered 503 for")
    with line.open(monkeypatch), retrying_with(QUICK), unavailable:
        door.upload(large, URI)
    assert door.find(URI) is None


@pytest.mark.parametrize("fault", ["truncate", "corrupt", "answer 503", "drop"])
@pytest.mark.parametrize("size", [1000, 12 * 2**20])
def test_a_download_that_breaks_is_repeated(
    s3: str, fault: str, size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = os.urandom(size)
    (tmp_path / "file").write_bytes(content)
    door.upload(tmp_path / "file", URI)
    with BadLine(s3, faults=[fault] * 2, concerns=gets).open(monkeypatch) as line:
        door.download(URI, tmp_path / "back")
        assert not line.faults
    assert (tmp_path / "back").read_bytes() == content


@pytest.mark.parametrize("fault", ["truncate", "corrupt", "answer 503"])
def test_small_objects_are_read_again_when_they_break(
    s3: str, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    door.write(URI, b"small but whole")
    with BadLine(s3, faults=[fault], concerns=gets).open(monkeypatch) as line:
        assert door.read(URI) == b"small but whole"
        assert not line.faults


def test_an_object_that_is_not_what_was_written_is_refused(s3: str, tmp_path: Path) -> None:
    door.write(URI, b"right")
    metadata = {"sha256": "0" * 64}
    boto3.client("s3").put_object(Bucket="pile", Key="folder/object", Body=b"x", Metadata=metadata)
    with pytest.raises(ObjectUnreadable, match="was damaged on the way .* not those that were"):
        door.download(URI, tmp_path / "back")
    with pytest.raises(ObjectUnreadable, match="was damaged on the way"):
        door.read(URI)
    assert not list(tmp_path.iterdir())


def test_objects_of_others_have_no_digest_and_are_taken(s3: str, tmp_path: Path) -> None:
    boto3.client("s3").put_object(Bucket="pile", Key="folder/object", Body=b"theirs")
    door.download(URI, tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == b"theirs"


def test_what_is_not_there_is_no_fault_of_the_store(s3: str, tmp_path: Path) -> None:
    assert door.find(URI) is None
    with pytest.raises(ObjectUnreadable, match="S3 answered 404 for s3://pile/folder/object"):
        door.download(URI, tmp_path / "back")
    with pytest.raises(ObjectUnreadable, match="NoSuchKey"):
        door.read(URI)
    door.delete([URI])


def test_a_condition_keeps_the_object_of_another(s3: str) -> None:
    first = door.write(URI, b"1", replaces="")
    with pytest.raises(ObjectTaken):
        door.write(URI, b"2", replaces="")
    second = door.write(URI, b"2", replaces=first)
    with pytest.raises(ObjectTaken):
        door.write(URI, b"3", replaces=first)
    assert door.read(URI) == b"2"
    assert door.find(URI) == door.RemoteObject(
        uri=URI, size_bytes=1, etag=second, sha256=door.hashlib.sha256(b"2").hexdigest()
    )


def no_bucket() -> None:
    door.write("s3://nowhere/x", b"")


def no_network() -> None:
    os.environ["AWS_ENDPOINT_URL"] = "http://127.0.0.1:9"
    door.objects_with_prefix(URI)


def no_address() -> None:
    os.environ["AWS_ENDPOINT_URL"] = "store:9000"
    door.read(URI)


def no_profile() -> None:
    os.environ["AWS_PROFILE"] = "nobody"
    door.read(URI)


def no_credentials() -> None:
    del os.environ["AWS_ACCESS_KEY_ID"], os.environ["AWS_SECRET_ACCESS_KEY"]
    door.write(URI, b"")


@pytest.mark.parametrize(
    ("cause", "kind", "advice"),
    [
        (
            no_bucket,
            StoreRefused,
            "NoSuchBucket for s3://nowhere/x; create the bucket nowhere first",
        ),
        (no_profile, StoreRefused, r"profile \(nobody\).*check the AWS_\* variables"),
        (no_address, StoreRefused, r"set AWS_ENDPOINT_URL to http\(s\)://HOST"),
        (
            no_network,
            StoreUnavailable,
            "not reachable for s3://pile/.* check AWS_ENDPOINT_URL and the network",
        ),
        (no_credentials, StoreRefused, "no S3 credentials for s3://pile/.*; set AWS_ACCESS_KEY_ID"),
    ],
)
def test_an_error_says_what_to_do(
    s3: str,
    cause: Callable[[], None],
    kind: type[Exception],
    advice: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    for name in ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, os.environ[name])  # put back afterwards
    monkeypatch.setenv("AWS_PROFILE", "")
    monkeypatch.delenv("AWS_PROFILE")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    with retrying_with(QUICK), pytest.raises(kind, match=advice):
        cause()


def test_no_permission_is_refused_at_once(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    line = BadLine(s3, faults=["answer 403"], concerns=puts)
    with line.open(monkeypatch), pytest.raises(StoreRefused, match="AccessDenied .* credentials"):
        door.write(URI, b"")
    assert len(line.requests) == 1


def test_one_object_that_may_not_be_read_is_not_the_store_s_fault(
    s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    door.write(URI, b"theirs")
    line = BadLine(s3, faults=["answer 403"] * 2, concerns=lambda _, path: "/folder/" in path)
    with line.open(monkeypatch):
        with pytest.raises(ObjectUnreadable, match="S3 answered AccessDenied for"):
            door.read(URI)
        with pytest.raises(ObjectUnreadable, match="S3 answered 403 for"):
            door.download(URI, tmp_path / "back")
        assert door.read(URI) == b"theirs"


@pytest.mark.parametrize("fault", ["answer 503", "answer 429", "answer 500", "drop"])
def test_a_store_that_is_overloaded_for_long_is_waited_for(
    s3: str, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More faults than botocore's own attempts bear: nothing counts as unreadable."""
    door.write(URI, b"one of many")
    with BadLine(s3, faults=[fault] * 17, concerns=lambda *_: True).open(monkeypatch) as line:
        assert door.read(URI) == b"one of many"
        assert not line.faults


@pytest.mark.parametrize("fault", ["answer 503", "answer 429", "drop", "truncate"])
def test_a_store_that_stays_overloaded_is_unavailable_and_no_object_unreadable(
    s3: str, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    door.write(URI, b"one of many")
    line = BadLine(s3, faults=[fault] * 999, concerns=gets)
    with line.open(monkeypatch), retrying_with(QUICK), pytest.raises(StoreUnavailable) as raised:
        door.read(URI)
    assert not isinstance(raised.value, UserError | ValueError | OSError)


def test_an_expired_token_is_renewed(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    door.write(URI, b"1")
    made = door._cached_client.cache_info().misses
    with BadLine(s3, faults=["answer 400"], concerns=gets).open(monkeypatch) as line:
        assert door.read(URI) == b"1"
        assert not line.faults
    assert door._cached_client.cache_info().misses < made  # cleared: a client of its own after it
    line = BadLine(s3, faults=["answer 400"] * 99, concerns=gets)
    unavailable = pytest.raises(StoreUnavailable, match="ExpiredToken .*; renew the credentials")
    with line.open(monkeypatch), retrying_with(QUICK), unavailable:
        door.read(URI)


def test_credentials_of_a_mounted_secret_are_taken(
    s3: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    secret = tmp_path / "credentials"
    secret.write_text("[default]\naws_access_key_id = a\naws_secret_access_key = b\n")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(secret))
    door.write(URI, b"mounted")
    assert door.read(URI) == b"mounted"


def test_a_store_without_conditions_takes_everything(
    s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with BadLine(s3, faults=["answer 501"], concerns=puts).open(monkeypatch):
        door.write(URI, b"1", replaces="")
    assert door.read(URI) == b"1"


def test_a_password_in_the_endpoint_is_not_shown(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://user:hidden@127.0.0.1:9")
    with retrying_with(QUICK), pytest.raises(DinopipeError, match="is not reachable") as raised:
        door.objects_with_prefix(URI)
    assert "hidden" not in str(raised.value)
