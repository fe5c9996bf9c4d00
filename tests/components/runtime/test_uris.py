"""places: paths are their own place, URIs have one in the spool."""

from __future__ import annotations

from pathlib import Path

import pytest

from components.runtime.uris import bucket_and_key, cache_directory, is_remote, join_uri, local_path


def test_a_path_is_its_own_place() -> None:
    assert local_path("/data/run") == Path("/data/run")
    assert not is_remote("/data/s3://run")


def test_a_uri_has_a_place_in_the_spool(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DINOPIPE_SPOOL", str(tmp_path))
    assert local_path("s3://pile/a/b.tar") == tmp_path / "pile" / "a" / "b.tar"
    assert is_remote("s3://pile/a")
    monkeypatch.delenv("DINOPIPE_SPOOL")
    assert cache_directory() == Path.home() / ".cache" / "dinopipe"


def test_names_are_put_below_a_place() -> None:
    assert join_uri("s3://pile/a/", "b", "c.json") == "s3://pile/a/b/c.json"
    assert bucket_and_key("s3://pile/odd/a#1?.jpg") == ("pile", "odd/a#1?.jpg")


@pytest.mark.parametrize("uri", ["s3://", "s3:///key", "s3://pile/../other", "s3://../x"])
def test_a_uri_cannot_lead_out_of_the_spool(uri: str) -> None:
    with pytest.raises(ValueError, match="names no place in a bucket; write s3://BUCKET/PREFIX"):
        local_path(uri)


def test_a_secret_in_a_uri_is_refused_and_not_told() -> None:
    with pytest.raises(ValueError, match=r"^s3://pile/x names no place") as raised:
        local_path("s3://key:hidden@pile/x")
    assert "hidden" not in str(raised.value)
