"""storage: each verb means the same for a path and for a URI, and copies only what is missing."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import boto3
import pytest

from components.runtime import s3 as door
from components.runtime.storage import (
    delete,
    download,
    download_if_newer,
    download_object,
    exists,
    find_object,
    list_names,
    local_path,
    read_text,
    upload,
    write_text,
)
from dinov2_core.errors import InputError
from tests.s3_server import BadLine

HOME = "s3://pile/run/stages/curate/0123"


@pytest.fixture(params=["path", "uri"])
def home(request: pytest.FixtureRequest, s3: str, tmp_path: Path) -> str:
    return HOME if request.param == "uri" else str(tmp_path / "run")


@pytest.fixture
def directory(s3: str) -> Path:
    """A finished directory in the cache."""
    directory = local_path(HOME)
    for name in (
        "shards/0.tar",
        "shards/1.tar",
        "table",
        ".hidden",
        "shards/.part",
        "lock",
        "pile/x",
    ):
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(name)
    return directory


def keys() -> set[str]:
    found = boto3.client("s3").list_objects_v2(Bucket="pile").get("Contents", [])
    return {entry["Key"].removeprefix("run/stages/curate/0123/") for entry in found}


def requests_of(line: BadLine, method: str) -> list[str]:
    return [path for used, path in line.requests if used == method]


def test_texts_are_written_read_listed_and_removed(home: str) -> None:
    assert not exists(home)
    assert list_names(home) == []
    assert read_text(f"{home}/b/1.json") is None
    write_text(f"{home}/b/1.json", "ü")
    write_text(f"{home}/a", "old")
    write_text(f"{home}/a", "new")
    assert exists(home)
    assert exists(f"{home}/b")
    assert exists(f"{home}/a")
    assert not exists(f"{home}/b/1")
    assert list_names(home) == ["a", "b/1.json"]
    assert (read_text(f"{home}/a"), read_text(f"{home}/b/1.json")) == ("new", "ü")
    delete(f"{home}/b")
    delete(f"{home}/b")
    assert list_names(home) == ["a"]


def test_a_path_is_downloaded_and_uploaded_without_a_copy(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("1")
    assert download(str(tmp_path)) == tmp_path
    upload(tmp_path, str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_directory_goes_to_the_store_and_comes_back_to_an_empty_cache(directory: Path) -> None:
    upload(directory, HOME, leaving_out=["pile"])
    assert keys() == {"shards/0.tar", "shards/1.tar", "table"}
    shutil.rmtree(directory.parents[4])
    calls: list[tuple[int, int]] = []
    assert download(f"{HOME}/shards", progress=lambda *at: calls.append(at)) == directory / "shards"
    assert {p.name: p.read_text() for p in directory.rglob("*.tar")} == {
        "0.tar": "shards/0.tar",
        "1.tar": "shards/1.tar",
    }
    assert calls == [(0, 24), (12, 24), (24, 24)]
    assert not (directory / "table").exists()


def test_what_both_sides_have_is_not_copied_again(
    s3: str, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload(directory, HOME)
    with BadLine(s3, faults=[], concerns=lambda *_: True).open(monkeypatch) as line:
        upload(directory, HOME)
        download(HOME)
        assert not requests_of(line, "PUT")
        assert [path for path in requests_of(line, "GET") if "list-type" not in path] == []
        (directory / "table").write_text("changed")
        upload(directory, HOME)
        assert len(requests_of(line, "PUT")) == 1
    (directory / "shards" / "0.tar").write_text("damaged on disk")
    download(HOME)
    assert (directory / "shards" / "0.tar").read_text() == "shards/0.tar"
    write_text(f"{HOME}/table", "written elsewhere")
    download(f"{HOME}/table")
    assert (directory / "table").read_text() == "written elsewhere"


def test_what_is_not_in_the_store_is_an_input_error(s3: str) -> None:
    with pytest.raises(InputError, match="0123 does not exist; run the stage that writes it"):
        download(HOME)


def test_a_damaged_object_is_reported_with_the_remedy(s3: str) -> None:
    metadata = {"sha256": "0" * 64}
    boto3.client("s3").put_object(Bucket="pile", Key="a", Body=b"x", Metadata=metadata)
    with pytest.raises(InputError, match="damaged on the way .* again, without the cache"):
        download("s3://pile/a")
    assert not local_path("s3://pile/a").exists()


def test_a_file_that_grew_elsewhere_is_downloaded_and_one_that_grew_here_stays(s3: str) -> None:
    place = f"{HOME}/metrics.jsonl"
    path = local_path(place)
    download_if_newer(place)
    assert not path.exists()
    path.parent.mkdir(parents=True)
    path.write_text("1\n")
    upload(path, place, is_growing=True)
    path.write_text("1\n2\n")
    download_if_newer(place)
    assert path.read_text() == "1\n2\n"
    write_text(place, "1\n3\n4\n")  # another node
    download_if_newer(place)
    assert path.read_text() == "1\n3\n4\n"


@pytest.mark.parametrize("is_growing", [False, True])
def test_a_file_may_be_large(
    s3: str, is_growing: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(door, "PART_BYTES", 5 * 2**20)
    path = local_path(f"{HOME}/metrics.jsonl")
    path.parent.mkdir(parents=True)
    content = os.urandom(6 * 2**20)
    path.write_bytes(content)
    upload(path, f"{HOME}/metrics.jsonl", is_growing=is_growing)
    download(f"{HOME}/metrics.jsonl")
    assert path.read_bytes() == content
    assert [entry.name for entry in path.parent.iterdir()] == ["metrics.jsonl"]
    fetched = boto3.client("s3").get_object(
        Bucket="pile", Key=HOME.removeprefix("s3://pile/") + "/metrics.jsonl"
    )
    assert fetched["Body"].read() == content


FETCH = """
import sys; from components.runtime.storage import download
print(download(sys.argv[1], progress=lambda done, total: total and print("downloads", flush=True)))
"""


def test_ranks_of_one_node_download_a_directory_once(s3: str, directory: Path) -> None:
    upload(directory, HOME)
    shutil.rmtree(directory)
    command = [sys.executable, "-c", FETCH, HOME]
    ranks = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    outputs = [rank.communicate(timeout=60)[0].splitlines() for rank in ranks]
    assert [lines[-1] for lines in outputs] == [str(directory)] * 3
    assert sum("downloads" in lines for lines in outputs) == 1


def test_one_object_is_found_and_downloaded(s3: str, tmp_path: Path) -> None:
    boto3.client("s3").put_object(Bucket="pile", Key="a/w.pth", Body=b"three")
    item = find_object("s3://pile/a/w.pth")
    assert item.size_bytes == 5
    path = download_object("s3://pile/a/w.pth", directory=tmp_path / "new")
    assert path.read_bytes() == b"three"
    assert path.name == f"{item.etag.strip(chr(34))}.pth"
    assert list(path.parent.iterdir()) == [path]
    with pytest.raises(InputError, match="S3 answered 404 for s3://pile/a/none"):
        find_object("s3://pile/a/none")


def test_a_temporary_file_that_vanishes_does_not_break_a_copy(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (directory / "gone").symlink_to(directory / "nothing")
    upload(directory, HOME)
    assert "gone" not in keys()
