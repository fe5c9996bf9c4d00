"""uris: a path is its own path, a URI has one in the cache."""

from __future__ import annotations

from pathlib import Path

import pytest

from components.runtime.uris import (
    bucket_and_key,
    cache_directory,
    is_remote,
    join_uri,
    local_path,
    without_password,
)
from dinov2_core.errors import SettingsError


def test_a_path_is_its_own_path() -> None:
    assert local_path("/data/run") == Path("/data/run")
    assert not is_remote("/data/s3://run")


def test_a_uri_has_a_path_in_the_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DINOPIPE_CACHE", str(tmp_path))
    assert local_path("s3://pile/a/b.tar") == tmp_path / "pile" / "a" / "b.tar"
    assert is_remote("s3://pile/a")


def test_the_cache_s_former_variable_is_still_read(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("DINOPIPE_CACHE", raising=False)
    monkeypatch.delenv("DINOPIPE_SPOOL", raising=False)
    assert cache_directory() == Path.home() / ".cache" / "dinopipe"
    monkeypatch.setenv("DINOPIPE_SPOOL", str(tmp_path / "former"))
    assert cache_directory() == tmp_path / "former"
    monkeypatch.setenv("DINOPIPE_CACHE", str(tmp_path / "new"))
    assert cache_directory() == tmp_path / "new"


def test_names_are_joined_to_a_uri() -> None:
    assert join_uri("s3://pile/a/", "b", "c.json") == "s3://pile/a/b/c.json"
    assert bucket_and_key("s3://pile/odd/a#1?.jpg") == ("pile", "odd/a#1?.jpg")


@pytest.mark.parametrize("uri", ["s3://", "s3:///key", "s3://pile/../other", "s3://../x"])
def test_a_uri_cannot_lead_out_of_the_cache(uri: str) -> None:
    with pytest.raises(SettingsError, match="names nothing in a bucket; write s3://BUCKET/PREFIX"):
        local_path(uri)


def test_a_secret_in_a_uri_is_refused_and_not_shown() -> None:
    with pytest.raises(SettingsError, match=r"^s3://pile/x names nothing") as raised:
        local_path("s3://key:hidden@pile/x")
    assert "hidden" not in str(raised.value)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("http://me:hunter2@host:5000/x", "http://host:5000/x"),
        ("http://me:hun@ter2@host/x (Max retries)", "http://host/x (Max retries)"),
        ("https://token@a and https://b/c@d", "https://a and https://b/c@d"),
    ],
)
def test_passwords_are_removed_from_any_text(text: str, shown: str) -> None:
    assert without_password(text) == shown
