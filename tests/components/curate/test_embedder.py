from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from PIL import Image

from components.curate.config import (
    Embedding,
    PixelEmbedding,
    TimmEmbedding,
    TorchScriptEmbedding,
)
from components.curate.embedder import check_gpus, embedder_of
from dinov2_core.errors import SettingsError


def test_every_kind_embeds(tmp_path: Path) -> None:
    name = "test_vit.r160_in1k"
    weights = tmp_path / "weights.pt"
    torch.save(timm.create_model(name).state_dict(), weights)
    module = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(2), torch.nn.Flatten())
    torch.jit.script(module).save(tmp_path / "net.pt")  # type: ignore[no-untyped-call]
    embeddings: list[Embedding] = [
        PixelEmbedding(),
        TimmEmbedding(name=name, weights=str(weights), size_pixels=160),
        TorchScriptEmbedding(path=str(tmp_path / "net.pt"), size_pixels=32),
    ]
    image = Image.new("RGB", (20, 20), (200, 10, 90))
    for embedding in embeddings:
        embedder = embedder_of(embedding)
        (vector,) = embedder.embed([embedder.prepare(image)])
        assert vector @ vector == pytest.approx(1, abs=1e-5)


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    network = TorchScriptEmbedding(path="net.pt")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(
        SettingsError, match=r"embedding_topology\.processes_per_node 3 is more than the 2 GPUs"
    ):
        check_gpus(network, num_processes=3)
    check_gpus(network, num_processes=2)
    check_gpus(PixelEmbedding(), num_processes=3)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    check_gpus(network, num_processes=3)
