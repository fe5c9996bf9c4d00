from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import boto3
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from PIL import Image

from pipelines.preflight import check_inputs
from pipelines.spec.pipeline_spec import load_spec
from tests.pipelines.specs import small_values, write_spec
from tests.s3_server import s3_server


def problems(values: dict[str, Any], folder: Path) -> str:
    spec = load_spec(write_spec(values, folder / "spec.yaml"))
    return "\n".join(map(str, check_inputs(spec)))


def test_a_right_spec_has_no_problem(pile: Path, tmp_path: Path) -> None:
    assert problems(small_values(pile), tmp_path) == ""


def test_a_missing_folder_and_an_empty_one_differ(tmp_path: Path) -> None:
    assert "does not exist" in problems(small_values(tmp_path / "none"), tmp_path)
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "holds no file" in problems(small_values(empty), tmp_path)


def test_parquet_files_in_a_folder_are_no_images(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(3):
        parquet.write_table(pa.table({"image": [b""]}), folder / f"train-{number}.parquet")
    text = problems(small_values(folder), tmp_path)
    assert "images.uri: " in text
    assert "holds 3 Parquet files and no image; name one Parquet file" in text


def labelled(folder: Path, name: str, labels: list[str], *, each: int = 20) -> str:
    """A folder for each class with copies of a real image."""
    content = png()
    for label in labels:
        (folder / name / label).mkdir(parents=True)
        for number in range(each):
            (folder / name / label / f"{number}.png").write_bytes(content)
    return str(folder / name)


def png() -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (28, 28)).save(buffer, "PNG")
    return buffer.getvalue()


def set_problems(pile: Path, folder: Path, *, train: str, test: str, **changes: Any) -> str:
    sets = [{"name": "a", "train": train, "test": test}]
    return problems(small_values(pile, evaluation_sets=sets, **changes), folder)


def test_labels_must_match(pile: Path, tmp_path: Path) -> None:
    train = labelled(tmp_path, "train", ["cat", "dog"])
    test = labelled(tmp_path, "test", ["cat", "cow"])
    text = set_problems(pile, tmp_path, train=train, test=test)
    assert text.startswith("evaluation_sets.0: train and test have different classes")
    assert "only train has dog, only test has cow" in text


def test_a_set_without_labels_is_reported(pile: Path, tmp_path: Path) -> None:
    flat = tmp_path / "flat"
    flat.mkdir()
    (flat / "x.png").write_bytes(b"")
    text = set_problems(pile, tmp_path, train=str(flat), test=str(tmp_path / "gone"))
    first, second = text.splitlines()
    assert first.startswith("evaluation_sets.0.train: ")
    assert "put the images of each class into a folder" in first
    assert second.startswith("evaluation_sets.0.test: ")
    assert "does not exist" in second


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("empty", "evaluation_sets.0.test: class folder .*/test/dog has no image of its own"),
        ("linked", "evaluation_sets.0.test: class folder .*/test/dog has no image of its own"),
        ("stray", "evaluation_sets.0.test: .*/dog/notes.txt is in a class and is no image"),
        ("elsewhere", "^$"),
    ],
)
def test_class_folders_are_looked_into(
    change: str, message: str, pile: Path, tmp_path: Path
) -> None:
    train = labelled(tmp_path, "train", ["cat", "dog"])
    test = Path(labelled(tmp_path, "test", ["cat"]))
    match change:
        case "empty":
            (test / "dog").mkdir()
        case "linked":
            (test / "dog").symlink_to(test / "cat")
        case "stray":
            labelled(test, "dog", [""])
            (test / "dog/notes.txt").write_text("none")
        case _:
            (test / "dog").symlink_to(labelled(tmp_path, "elsewhere", ["dog"]))
    assert re.search(message, set_problems(pile, tmp_path, train=train, test=str(test)))


def test_sets_must_be_large_enough(pile: Path, tmp_path: Path) -> None:
    train = labelled(tmp_path, "train", ["cat", "dog"], each=8)
    test = labelled(tmp_path, "test", ["cat", "dog"], each=1)
    changes = {"evaluate": {"neighbours": [10, 17]}}
    text = set_problems(pile, tmp_path, train=train, test=test, **changes)
    assert re.search("evaluation_sets.0.train: '.* has 16 images; label at least 20", text)
    assert "evaluate.neighbours: 17 is more than the 16 images of evaluation_sets.0.train" in text


def test_labelled_sets_and_probes_in_a_store_are_checked_like_local_ones(
    pile: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = Path(labelled(tmp_path, "sets", ["train/cat", "train/dog", "test/cat", "test/dog"]))
    probe = {"train": "s3://pile/probe.parquet", "every_steps": 4}
    images = [png()] * 4
    with s3_server(monkeypatch, cache_directory=tmp_path / "cache"):
        client = boto3.client("s3")
        for path in root.rglob("*.png"):
            client.upload_file(str(path), "pile", path.relative_to(root).as_posix())
        with io.BytesIO() as file:
            parquet.write_table(pa.table({"image": images, "label": [1, 2, 1, 2]}), file)
            client.put_object(Bucket="pile", Key="probe.parquet", Body=file.getvalue())
        sets = {"train": "s3://pile/train", "test": "s3://pile/test"}
        assert set_problems(pile, tmp_path, **sets, pretrain__probe=probe) == ""
        client.put_object(Bucket="pile", Key="test/cow/1.png", Body=png())
        client.delete_object(Bucket="pile", Key="probe.parquet")
        text = set_problems(pile, tmp_path, **sets, pretrain__probe=probe)
    assert "evaluation_sets.0: " in text
    assert "only test has cow" in text
    assert "pretrain.probe.train: " in text


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


def test_s3_without_credentials_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    text = problems(small_values("s3://bucket/pile"), tmp_path)
    assert "images.uri: no S3 credentials for s3://bucket/pile;" in text
    values = small_values("s3://bucket/pile", pretrain__initial_weights="s3://bucket/w.pth")
    text = problems(values, tmp_path)
    assert "pretrain.initial_weights: no S3 credentials for s3://bucket/w.pth" in text
