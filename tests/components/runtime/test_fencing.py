from __future__ import annotations

from pathlib import Path

import pytest

from components.runtime import s3 as objects
from components.runtime.fencing import check_fence, fence, lift_fence
from dinov2_core.errors import LeaseLost

DIRECTORY = "s3://pile/stages/curate/0"


def test_nothing_below_a_fenced_prefix_is_written_or_removed(s3: str, tmp_path: Path) -> None:
    objects.write(f"{DIRECTORY}/old", b"1")
    (tmp_path / "file").write_text("2")
    fence(DIRECTORY, reason="taken over by run b")
    try:
        for write in (
            lambda: objects.write(f"{DIRECTORY}/new", b"2"),
            lambda: objects.upload(tmp_path / "file", f"{DIRECTORY}/new"),
            lambda: objects.delete([f"{DIRECTORY}/old"]),
        ):
            with pytest.raises(LeaseLost, match="taken over by run b"):
                write()
        assert [item.uri for item in objects.objects_with_prefix(DIRECTORY)] == [f"{DIRECTORY}/old"]
        objects.write(f"{DIRECTORY}1/other", b"a sibling")
    finally:
        lift_fence(DIRECTORY)
    check_fence(f"{DIRECTORY}/new")
