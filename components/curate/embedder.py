"""The embedder that the settings name."""

from __future__ import annotations

from pathlib import Path
from typing import assert_never

import torch

from components.curate.config import (
    Embedding,
    PixelEmbedding,
    TimmEmbedding,
    TorchScriptEmbedding,
)
from dinov2_core.curation.embedding import (
    Embedder,
    PixelEmbedder,
    timm_embedder,
    torchscript_embedder,
)
from dinov2_core.errors import SettingsError


def embedder_of(embedding: Embedding, *, local_rank: int = 0) -> Embedder:
    """An embedder on this process's own GPU, or on the CPU where there is none.

    Args:
        embedding: Settings.
        local_rank: Number of this process on its node.
    """
    device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    match embedding:
        case PixelEmbedding():
            return PixelEmbedder()
        case TimmEmbedding():
            weights = Path(embedding.weights) if embedding.weights else None
            return timm_embedder(
                embedding.name,
                weights=weights,
                image_size_pixels=embedding.size_pixels,
                device=device,
            )
        case TorchScriptEmbedding():
            return torchscript_embedder(
                Path(embedding.path), image_size_pixels=embedding.size_pixels, device=device
            )
        case _:
            assert_never(embedding)


def check_gpus(embedding: Embedding, *, num_processes: int) -> None:
    """Check that every process has a GPU of its own on a machine that has any.

    Raises:
        SettingsError: Some process of a network would have no GPU.
    """
    num_gpus = torch.cuda.device_count()
    if embedding.kind != "pixels" and 0 < num_gpus < num_processes:
        raise SettingsError(
            f"curate.embedding_topology.processes_per_node {num_processes} is more than the "
            f"{num_gpus} GPUs of this machine, and every rank needs its own; set it to {num_gpus}"
        )
