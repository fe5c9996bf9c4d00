"""The directory of a plan: files that no plan wrote stay as they are, whatever happens."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from dinov2_core.errors import InputError
from pipelines.__main__ import main
from pipelines.plan.output_directory import INDEX, read_plan, write_plan
from tests.pipelines.specs import small_values, write_spec

OLD = {"pipeline.yaml": "a: 1\n", "pretrain-trainjobs.yaml": "b: 1\n"}
NEW = {"pipeline.yaml": "a: 2\n", "manifests.yaml": "c: 2\n"}
MINE = "mine: and nobody else's\n"


def content(directory: Path) -> dict[str, str]:
    return {
        path.name: path.read_text()
        for path in directory.iterdir()
        if path.name != INDEX and not path.name.startswith(".")
    }


def test_a_plan_replaces_and_removes_what_an_earlier_plan_wrote_and_nothing_else(
    tmp_path: Path,
) -> None:
    (tmp_path / "deployment.yaml").write_text(MINE)
    write_plan(OLD, tmp_path)
    assert read_plan(tmp_path) == OLD
    write_plan(NEW, tmp_path)
    assert read_plan(tmp_path) == NEW
    assert content(tmp_path) == {**NEW, "deployment.yaml": MINE}


def test_planning_into_the_folder_of_the_spec_keeps_spec_and_manifests(tmp_path: Path) -> None:
    spec = write_spec(small_values("s3://bucket/pile"), tmp_path / "spec.yaml")
    before = spec.read_text()
    (tmp_path / "deployment.yaml").write_text(MINE)
    plan = ["plan", str(spec), "--hardware", "cpu", "--no-scaling", "--json", "-o", str(tmp_path)]
    for _ in range(2):
        assert main(plan) == 0
    assert set(content(tmp_path)) == {"spec.yaml", "deployment.yaml", "pipeline.yaml"}
    assert spec.read_text() == before
    assert (tmp_path / "deployment.yaml").read_text() == MINE


def test_a_spec_with_the_name_of_a_planned_file_is_refused_and_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = write_spec(small_values("s3://bucket/pile"), tmp_path / "pipeline.yaml")
    before = spec.read_text()
    assert main(["plan", str(spec), "--hardware", "cpu", "-o", str(tmp_path)]) == 2
    assert f"{spec} was not written by dinopipe plan" in capsys.readouterr().err
    assert spec.read_text() == before
    assert [path.name for path in tmp_path.iterdir()] == ["pipeline.yaml"]


@pytest.mark.parametrize("name", ["pipeline.yaml", "manifests.yaml", "pretrain-trainjobs.yaml"])
def test_a_changed_file_is_refused_before_anything_is_written(tmp_path: Path, name: str) -> None:
    write_plan(OLD, tmp_path)
    (tmp_path / name).write_text(MINE)
    before = content(tmp_path)
    with pytest.raises(InputError, match=rf"{name} was not written by dinopipe plan"):
        write_plan(NEW, tmp_path)
    assert content(tmp_path) == before


def test_a_link_in_place_of_a_file_is_refused_even_if_its_content_is_the_plans(
    tmp_path: Path,
) -> None:
    plan, mine = tmp_path / "plan", tmp_path / "mine.yaml"
    write_plan(OLD, plan)
    for name in OLD:
        mine.write_text(OLD[name])
        (plan / name).unlink()
        (plan / name).symlink_to(mine)
        with pytest.raises(InputError, match=name):
            write_plan({"manifests.yaml": "c: 2\n"}, plan)
        assert mine.read_text() == OLD[name]
        (plan / name).unlink()
        (plan / name).write_text(OLD[name])


def test_a_folder_in_place_of_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "pipeline.yaml").mkdir()
    with pytest.raises(InputError, match=r"pipeline\.yaml was not written by"):
        write_plan(NEW, tmp_path)


@pytest.mark.parametrize(
    "index",
    [
        "",
        '{"files": ',
        "[]",
        '{"files": ["pipeline.yaml"]}',
        '{"files": {"../mine.yaml": []}}',
        '{"files": {"/etc/mine.yaml": []}}',
        '{"files": {"a/../../mine.yaml": []}}',
        '{"files": {"..": []}}',
        '{"files": {"mine.yaml\\n": []}}',
        '{"files": {"pipeline.yaml": ["not a digest"]}}',
    ],
)
def test_a_damaged_index_is_refused_and_nothing_is_touched(tmp_path: Path, index: str) -> None:
    plan, mine = tmp_path / "plan", tmp_path / "mine.yaml"
    mine.write_text(MINE)
    write_plan(OLD, plan)
    (plan / INDEX).write_text(index)
    with pytest.raises(InputError, match=r"\.dinopipe-plan\.json is damaged"):
        write_plan(NEW, plan)
    assert content(plan) == OLD
    assert mine.read_text() == MINE


def test_an_index_that_is_a_link_is_refused(tmp_path: Path) -> None:
    write_plan(OLD, tmp_path / "old")
    (tmp_path / "plan").mkdir()
    (tmp_path / "plan" / INDEX).symlink_to(tmp_path / "old" / INDEX)
    with pytest.raises(InputError, match="it is a symbolic link"):
        write_plan(NEW, tmp_path / "plan")
    assert read_plan(tmp_path / "old") == OLD


class Killed(BaseException):
    """Stands for the end of the process."""


CHANGES = ("open", "os.rename", "os.remove", "os.mkdir")
moments_left: list[int] = []


def _kill(event: str, _: tuple[object, ...]) -> None:
    if moments_left and event in CHANGES:
        moments_left[0] -= 1
        if moments_left[0] < 0:
            raise Killed


sys.addaudithook(_kill)


def test_a_kill_at_any_moment_loses_nothing_and_the_next_plan_goes_on(tmp_path: Path) -> None:
    for moment in range(100):
        plan = tmp_path / str(moment)
        write_plan(OLD, plan)
        (plan / "deployment.yaml").write_text(MINE)
        moments_left.append(moment)
        try:
            write_plan(NEW, plan)
            break
        except Killed:
            pass
        finally:
            moments_left.clear()
        for name, text in content(plan).items():  # whole files, of one plan or the other
            assert text in (OLD.get(name), NEW.get(name), MINE)
        write_plan(NEW, plan)
        assert content(plan) == {**NEW, "deployment.yaml": MINE}
    assert 8 < moment < 99


def test_a_file_made_by_somebody_after_a_kill_is_refused(tmp_path: Path) -> None:
    """The index of a killed plan names files that it did not come to write."""
    write_plan(OLD, tmp_path)
    index = json.loads((tmp_path / INDEX).read_text())
    index["files"]["manifests.yaml"] = ["0" * 64]
    (tmp_path / INDEX).write_text(json.dumps(index))
    (tmp_path / "manifests.yaml").write_text(MINE)
    with pytest.raises(InputError, match=r"manifests\.yaml"):
        write_plan(NEW, tmp_path)
    assert content(tmp_path) == {**OLD, "manifests.yaml": MINE}


def test_a_directory_without_an_index_holds_a_plan_only_to_compare_with(tmp_path: Path) -> None:
    (tmp_path / "pipeline.yaml").write_text("a: 1\n")
    assert read_plan(tmp_path) == {}
    assert read_plan(tmp_path, needs_index=False) == {"pipeline.yaml": "a: 1\n"}
    (tmp_path / "pipeline.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match=r"pipeline\.yaml is not text in UTF-8"):
        read_plan(tmp_path, needs_index=False)
    assert read_plan(tmp_path / "absent") == {}
    assert not os.path.lexists(tmp_path / "absent")
