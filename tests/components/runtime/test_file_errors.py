from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from components.runtime.file_errors import explained


def test_a_full_disk_names_the_directory_and_what_is_free(tmp_path: Path) -> None:
    with pytest.raises(OSError) as caught, Path("/dev/full").open("w") as file:
        file.write("x")
    assert caught.value.filename is None
    text = str(explained(caught.value, directory=tmp_path / "not" / "yet"))
    assert text.startswith(f"{tmp_path}/not/yet: No space left on device (")
    assert "MiB free on its file system" in text


def test_the_error_s_own_file_comes_first(tmp_path: Path) -> None:
    with pytest.raises(OSError) as caught:
        (tmp_path / "absent" / "file").write_text("x")
    text = str(explained(caught.value, directory="elsewhere"))
    assert text.startswith(f"{tmp_path}/absent/file: No such file or directory; choose another")


def test_a_name_in_bytes_is_readable() -> None:
    error = OSError(errno.EACCES, os.strerror(errno.EACCES), b"/root/x")
    assert str(explained(error, directory=".")).startswith("/root/x: Permission denied")
