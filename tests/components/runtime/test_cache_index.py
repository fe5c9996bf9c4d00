from __future__ import annotations

import threading
from pathlib import Path

import pytest

from components.runtime.cache_index import exclusively, file_stamp, known_copy, remember_copy


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DINOPIPE_CACHE", str(tmp_path))
    path = tmp_path / "bucket" / "a"
    path.parent.mkdir()
    path.write_text("1")
    return path


def test_a_copy_is_known_until_its_file_changes(file: Path) -> None:
    assert known_copy(file) == {}
    remember_copy(file, etag="e", stamp=file_stamp(file))
    assert known_copy(file) == {"etag": "e", "stamp": file_stamp(file)}
    file.write_text("22")
    assert known_copy(file)["stamp"] != file_stamp(file)
    assert list(file.parent.iterdir()) == [file]  # the index lies apart


def test_a_broken_index_is_no_knowledge(file: Path, tmp_path: Path) -> None:
    remember_copy(file, etag="e", stamp=[1, 2])
    (tmp_path / ".stored" / "bucket" / "a.json").write_text("{")
    assert known_copy(file) == {}


def test_processes_that_want_the_same_file_wait_for_each_other(file: Path) -> None:
    entered = threading.Event()

    def enter() -> None:
        with exclusively(file):
            entered.set()

    thread = threading.Thread(target=enter)
    with exclusively(file):
        thread.start()
        assert not entered.wait(0.1)
    thread.join(timeout=10)
    assert entered.is_set()
