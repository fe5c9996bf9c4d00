from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipelines.__main__ import main
from tests.pipelines.specs import small_values, write_spec


def test_init_writes_a_starter_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = tmp_path / "dinopipe.yaml"
    assert main(["init", str(spec)]) == 0
    assert "images:" in spec.read_text()
    spec.write_text("mine")
    assert main(["init", str(spec)]) == 2
    assert "exists already" in capsys.readouterr().err
    assert spec.read_text() == "mine"


def test_init_names_the_folder_that_it_cannot_write_to(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = tmp_path / "absent" / "spec.yaml"
    assert main(["init", str(spec)]) == 2
    assert capsys.readouterr().err.startswith(f"{spec}: No such file or directory")


def test_validate_accepts_a_right_spec(
    pile: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = write_spec(small_values(pile), tmp_path / "spec.yaml")
    assert main(["validate", str(spec)]) == 0
    assert "is right: demo, 12 + 4 steps on 1 ranks" in capsys.readouterr().out


def test_validate_counts_and_lists_every_problem(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = small_values(tmp_path / "none")
    spec = write_spec(
        {**values, "evaluation_sets": [{"name": "x", "train": "a", "test": "b"}]},
        tmp_path / "s.yaml",
    )
    assert main(["validate", str(spec)]) == 2
    text = capsys.readouterr().err
    assert "has 3 problems:" in text
    assert "images.uri: folder" in text
    assert "evaluation_sets.0.train: " in text
    assert "evaluation_sets.0.test: " in text


def test_the_starter_asks_for_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = tmp_path / "dinopipe.yaml"
    main(["init", str(spec)])
    assert main(["validate", str(spec)]) == 2
    assert "images.uri" in capsys.readouterr().err


def test_the_schema_describes_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    head = schema["$defs"]["Head"]["properties"]["num_prototypes"]
    assert head["description"].startswith("Number K of prototypes")
    undescribed = [
        f"{name}.{key}"
        for name, part in schema["$defs"].items()
        for key, value in part.get("properties", {}).items()
        if "description" not in value and key != "kind"
    ]
    assert not undescribed
