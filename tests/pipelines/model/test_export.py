"""export: a registered teacher is written for another program and compared."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file

from dinov2_core.models import build_backbone
from pipelines.__main__ import main
from pipelines.model.export import export_teacher
from tests.components.teachers import BACKBONE, IMAGE_SIZE


@torch.no_grad()
def test_the_console_writes_a_network_for_timm(
    store: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--model", "models:/registry-test@champion", "--tracking-uri", store]
    assert main(["export", *flags, "--format", "timm", "-o", str(tmp_path / "t")]) == 0
    assert "timm's tokens differ by at most" in capsys.readouterr().out
    network = timm.create_model(f"local-dir:{tmp_path / 't'}", pretrained=True).eval()
    torch.manual_seed(0)  # as the registered teacher was made
    teacher = build_backbone(BACKBONE, image_size_pixels=IMAGE_SIZE).eval()
    images = torch.randn(1, 3, IMAGE_SIZE, IMAGE_SIZE)
    torch.testing.assert_close(network(images), teacher.features(images).cls, atol=1e-5, rtol=1e-5)


def test_the_files_of_hugging_face_have_its_names(store: str, tmp_path: Path) -> None:
    checked = export_teacher(
        "models:/registry-test@champion",
        target="huggingface",
        directory=tmp_path,
        tracking_uri=store,
    )
    assert checked.startswith("all ")
    assert json.loads((tmp_path / "config.json").read_text())["hidden_size"] == 32
    assert "embeddings.cls_token" in load_file(tmp_path / "model.safetensors")


def test_an_absent_model_or_server_ends_before_anything_is_written(
    store: str, tmp_path: Path
) -> None:
    flags = ["--format", "timm", "-o", str(tmp_path / "o")]
    assert main(["export", "--model", "models:/no@champion", "--tracking-uri", store, *flags]) == 2
    far = ["--tracking-uri", "http://127.0.0.1:9"]
    assert main(["export", "--model", "models:/no@champion", *far, *flags]) == 1
    assert not (tmp_path / "o").exists()
