from __future__ import annotations

import io
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pyarrow.parquet as parquet
import pytest
import torch
from PIL import Image

from dinov2_core.errors import InputError, SettingsError, TrackingUnavailable
from dinov2_core.evaluation.preprocessing import Preprocessing, normalise
from dinov2_core.models import build_backbone
from pipelines.__main__ import main
from pipelines.model.embed import embed_images
from tests.components.teachers import BACKBONE, IMAGE_SIZE


def embed(
    images: Path | str, output: Path, tracking_uri: str = "", **options: Any
) -> tuple[int, int]:
    return embed_images(
        str(images),
        model_uri=options.pop("model_uri", "models:/registry-test@champion"),
        output=output,
        tracking_uri=tracking_uri,
        batch_size=4,
        **options,
    )


def pixels_of(seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def long_png(height: int) -> bytes:
    """A gray PNG of one column, a few bytes in all."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + checksum

    header = struct.pack(">IIBBBBB", 1, height, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(bytes(2 * height)))
        + chunk(b"IEND", b"")
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for index in range(5):
        (folder / f"{index}.png").write_bytes(png(pixels_of(index)))
    return folder


@torch.no_grad()
def expected(indices: list[int]) -> np.ndarray:
    """What the teacher gives that `store` registered."""
    torch.manual_seed(0)
    teacher = build_backbone(BACKBONE, image_size_pixels=IMAGE_SIZE).eval()
    preprocessing = Preprocessing(
        size_pixels=IMAGE_SIZE, mean=(0.5,) * 3, standard_deviation=(0.5,) * 3
    )
    pixels = np.stack([pixels_of(index) for index in indices])
    return teacher.features(normalise(pixels, preprocessing=preprocessing)).cls.numpy()


def test_a_bad_file_costs_only_itself(store: str, folder: Path, tmp_path: Path) -> None:
    (folder / "1.png").write_bytes(png(pixels_of(1))[:60])
    (folder / "2.png").write_bytes(long_png(20_000_000))
    (folder / "loop.png").symlink_to("loop2.png")
    (folder / "loop2.png").symlink_to("loop.png")
    (folder / "3.png").rename(folder / os.fsdecode(b"3\xff.png"))
    output = tmp_path / "x.parquet"
    assert embed(folder, output, store) == (7, 3)
    table = parquet.read_table(output).to_pydict()
    rows = dict(zip((Path(uri).name for uri in table["uri"]), table["embedding"], strict=True))
    errors = dict(zip(rows, table["error"], strict=True))
    found = np.array([rows[name] for name in ("0.png", "3\\xff.png", "4.png")], np.float32)
    np.testing.assert_allclose(found, expected([0, 3, 4]), atol=1e-6)
    assert errors["1.png"].startswith("truncated")
    assert "Too many levels of symbolic links" in errors["loop.png"]
    assert len(rows["2.png"]) == 32


def test_only_unreadable_files_end_with_exit_code_1(
    store: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.png").write_bytes(b"none")
    flags = ["--model", "models:/registry-test@champion", "--tracking-uri", store]
    output = tmp_path / "x.csv"
    assert main(["embed", *flags, str(tmp_path / "bad.png"), "-o", str(output)]) == 1
    assert "1 unreadable files have no embedding" in capsys.readouterr().out
    assert "not_an_image" in output.read_text()
    assert main(["embed", *flags, str(tmp_path / "bad.png"), "-o", str(tmp_path / "x.txt")]) == 2


SPY = """
import pathlib
pathlib.Path({touched!r}).touch()
import mlflow, numpy as np
class Spy(mlflow.pyfunc.PythonModel):
    def predict(self, context, model_input: list[bytes]):
        if any(content == b"bad" for content in model_input):
            raise KeyError("bad file")
        return np.array([[len(content), 1.0] for content in model_input], np.float32)
mlflow.models.set_model(Spy())
"""


def test_code_of_the_registry_runs_only_when_it_is_trusted(
    store: str, folder: Path, tmp_path: Path
) -> None:
    touched, code = tmp_path / "touched", tmp_path / "spy.py"
    code.write_text(SPY.format(touched=str(touched)))
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(store)
    try:
        with mlflow.start_run():
            mlflow.pyfunc.log_model(
                name="spy",
                python_model=str(code),
                pip_requirements=["mlflow"],
                registered_model_name="spy",
            )
    finally:
        mlflow.set_tracking_uri(before)
    touched.unlink()
    (folder / "0.png").write_bytes(b"bad")
    output = tmp_path / "x.npz"
    with pytest.raises(SettingsError, match="add --trust-code if you trust whoever registered it"):
        embed(folder, output, store, model_uri="models:/spy/1")
    assert not touched.exists()
    assert embed(folder, output, store, model_uri="models:/spy/1", trusts_code=True) == (5, 1)
    assert touched.exists()
    found = np.load(output)
    assert found["embedding"][1:, 1].tolist() == [1.0] * 4
    assert found["error"][0] == "KeyError: 'bad file'"


def test_a_teacher_is_embedded_by_its_weights_alone(
    store: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("the model's code was run")

    monkeypatch.setattr(mlflow.pyfunc, "load_model", forbidden)
    assert embed(folder, tmp_path / "x.parquet", store, trusts_code=True) == (5, 0)


def test_missing_images_are_refused(tmp_path: Path) -> None:
    with pytest.raises(Exception, match="does not exist"):
        embed(tmp_path / "none", tmp_path / "x.parquet")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds no file"):
        embed(tmp_path / "empty", tmp_path / "x.parquet")


def test_without_a_store_the_choice_is_explained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.png").write_bytes(b"")
    for name in ("a", "b"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "mlflow.db").write_bytes(b"")
    with pytest.raises(SettingsError, match="set --tracking-uri, for example .*runs/a/mlflow.db"):
        embed(tmp_path / "x.png", tmp_path / "x.parquet")


def test_an_unreachable_store_is_reported(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(b"")
    with pytest.raises(TrackingUnavailable, match="does not answer"):
        embed(tmp_path / "x.png", tmp_path / "x.parquet", tracking_uri="http://127.0.0.1:9")
