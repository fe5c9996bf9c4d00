from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from pipelines.preflight import check_places
from pipelines.spec.pipeline_spec import load_spec
from tests.pipelines.specs import small_values, write_spec


def problems(values: dict[str, Any], folder: Path) -> str:
    spec = load_spec(write_spec(values, folder / "spec.yaml"))
    return "\n".join(map(str, check_places(spec)))


def test_a_right_spec_has_no_problem(pile: Path, tmp_path: Path) -> None:
    assert problems(small_values(pile), tmp_path) == ""


def test_a_missing_folder_and_an_empty_one_differ(tmp_path: Path) -> None:
    assert "does not exist" in problems(small_values(tmp_path / "none"), tmp_path)
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "holds no file" in problems(small_values(empty), tmp_path)


def labelled(folder: Path, labels: list[str]) -> str:
    path = folder / f"{'-'.join(labels)}.parquet"
    parquet.write_table(pa.table({"image": [b""] * len(labels), "label": labels}), path)
    return str(path)


def test_labels_must_match(pile: Path, tmp_path: Path) -> None:
    sets = [
        {
            "name": "a",
            "train": labelled(tmp_path, ["cat", "dog"]),
            "test": labelled(tmp_path, ["cat", "cow"]),
        }
    ]
    text = problems(small_values(pile, evaluation_sets=sets), tmp_path)
    assert "only in train or only in test: cow, dog" in text


def test_a_set_without_labels_is_told(pile: Path, tmp_path: Path) -> None:
    flat = tmp_path / "flat"
    flat.mkdir()
    (flat / "x.png").write_bytes(b"")
    sets = [{"name": "a", "train": str(flat), "test": str(tmp_path / "gone")}]
    assert "put each class into a folder" in problems(
        small_values(pile, evaluation_sets=sets), tmp_path
    )


def test_files_that_are_named_must_exist(pile: Path, tmp_path: Path) -> None:
    changes = {
        "curate__embedding": {"kind": "torchscript", "path": str(tmp_path / "sscd.pt")},
        "pretrain__initial_weights": "teacher.safetensors",
    }
    changes["pretrain__probe"] = {"train": str(tmp_path / "labelled"), "every_steps": 4}
    text = problems(small_values(pile, **changes), tmp_path)
    assert "pretrain.probe.train: " in text
    assert "curate.embedding.path: " in text
    assert "pretrain.initial_weights: " in text


@pytest.mark.parametrize(("name", "known"), [("resnet18", True), ("resnet_of_mine", False)])
def test_model_names_of_timm_are_checked(
    name: str, known: bool, pile: Path, tmp_path: Path
) -> None:
    text = problems(small_values(pile, curate__embedding={"kind": "timm", "name": name}), tmp_path)
    assert ("is not a model of timm" not in text) == known


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("timm:vit_small_patch14_dinov2.lvd142m", ""),
        ("timm:vit_of_mine.tag", "is not a model of timm"),
        ("models:/teacher@champion", ""),
    ],
)
def test_starting_weights_elsewhere_are_checked(
    source: str, message: str, pile: Path, tmp_path: Path
) -> None:
    text = problems(small_values(pile, pretrain__initial_weights=source), tmp_path)
    assert (message in text and "pretrain.initial_weights: " in text) if message else not text


def test_s3_without_credentials_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    text = problems(small_values("s3://bucket/pile"), tmp_path)
    assert "images.uri: no S3 credentials for s3://bucket/pile/" in text
    values = small_values("s3://bucket/pile", pretrain__initial_weights="s3://bucket/w.pth")
    text = problems(values, tmp_path)
    assert "pretrain.initial_weights: no S3 credentials for s3://bucket/w.pth" in text
