"""Embedders: images to unit vectors whose cosine says how alike two images are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

_PIXEL_SIDE = 16


class Embedder(Protocol):
    """Turns images into unit vectors."""

    def embed(self, images: Sequence[Image.Image]) -> NDArray[np.float32]:
        """Unit vectors [N, E] of images in mode `L` or `RGB`, each of its image alone."""
        ...


class PixelEmbedder:
    """16 x 16 colours and their gradients: no weights, sees the picture and not its meaning."""

    def embed(self, images: Sequence[Image.Image]) -> NDArray[np.float32]:
        """Unit vectors [N, 1248]; aspect ratio and overall brightness do not count."""
        colours = np.zeros((len(images), _PIXEL_SIDE, _PIXEL_SIDE, 3), dtype=np.float32)
        for number, image in enumerate(images):
            colours[number] = _small(image)
        gray = colours.mean(axis=3)
        parts = (
            colours - colours.mean(axis=(1, 2, 3), keepdims=True),
            np.diff(gray, axis=1),
            np.diff(gray, axis=2),
        )
        flat = [p.reshape(len(images), int(np.prod(p.shape[1:]))) for p in parts]
        return unit_rows(np.concatenate(flat, axis=1))


class ModuleEmbedder:
    """Any network from normalised images [N, 3, S, S] to features [N, E] or [N, E, h, w]."""

    def __init__(
        self,
        module: nn.Module,
        *,
        image_size_pixels: int,
        mean: tuple[float, float, float],
        standard_deviation: tuple[float, float, float],
        device: torch.device,
        batch_size: int = 64,
    ) -> None:
        """Take over a network.

        Args:
            module: The network; put into evaluation mode and onto the device.
            image_size_pixels: Side S that images are resized to, aspect ratio not kept.
            mean: Subtracted per channel from values in [0, 1].
            standard_deviation: Divides per channel.
            device: Where the network runs.
            batch_size: Images per forward pass.
        """
        self._module = module.eval().to(device)
        self._image_size_pixels = image_size_pixels
        self._mean = torch.tensor(mean).view(3, 1, 1)
        self._standard_deviation = torch.tensor(standard_deviation).view(3, 1, 1)
        self._device = device
        self._batch_size = batch_size

    def embed(self, images: Sequence[Image.Image]) -> NDArray[np.float32]:
        """Unit vectors [N, E]; feature maps are averaged over positions."""
        starts = range(0, len(images), self._batch_size)
        batches = [self._features(images[i : i + self._batch_size]) for i in starts]
        return unit_rows(torch.cat(batches).numpy())

    @torch.inference_mode()
    def _features(self, images: Sequence[Image.Image]) -> Tensor:
        batch = torch.stack([self._normalized(image) for image in images]).to(self._device)
        features: Tensor = self._module(batch)
        features = features.mean(dim=(2, 3)) if features.ndim == 4 else features
        return features.float().cpu()

    def _normalized(self, image: Image.Image) -> Tensor:
        side = self._image_size_pixels
        resized = image.convert("RGB").resize((side, side), Image.Resampling.BICUBIC)
        pixels = torch.from_numpy(np.array(resized)).permute(2, 0, 1).float() / 255
        return (pixels - self._mean) / self._standard_deviation


def timm_embedder(
    name: str, *, weights: Path | None, image_size_pixels: int, device: torch.device
) -> ModuleEmbedder:
    """A network of timm without its classifier.

    Args:
        name: Model name of timm.
        weights: State dict of the same network on this machine; None fetches timm's own.
        image_size_pixels: Side that images are resized to.
        device: Where the network runs.
    """
    import timm

    module = timm.create_model(name, pretrained=weights is None, num_classes=0)
    if weights is not None:
        state = torch.load(weights, map_location="cpu", weights_only=True)
        classifier = str(module.pretrained_cfg.get("classifier", "")) + "."
        kept = {key: value for key, value in state.items() if not key.startswith(classifier)}
        module.load_state_dict(kept, strict=True)
    return ModuleEmbedder(
        module,
        image_size_pixels=image_size_pixels,
        mean=tuple(module.pretrained_cfg["mean"]),
        standard_deviation=tuple(module.pretrained_cfg["std"]),
        device=device,
    )


def torchscript_embedder(
    path: Path, *, image_size_pixels: int, device: torch.device
) -> ModuleEmbedder:
    """A TorchScript file such as SSCD's (arXiv:2202.10261), normalised as ImageNet.

    Args:
        path: The TorchScript file.
        image_size_pixels: Side that images are resized to; SSCD takes 320.
        device: Where the network runs.
    """
    module: nn.Module = torch.jit.load(path, map_location="cpu")  # type: ignore[no-untyped-call]
    return ModuleEmbedder(
        module,
        image_size_pixels=image_size_pixels,
        mean=(0.485, 0.456, 0.406),
        standard_deviation=(0.229, 0.224, 0.225),
        device=device,
    )


def unit_rows(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    """Rows [N, E] divided by their lengths; a row of zeros stays zero."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.ascontiguousarray(vectors / np.maximum(lengths, 1e-12), dtype=np.float32)


def _small(image: Image.Image) -> NDArray[np.float32]:
    resized = image.convert("RGB").resize((_PIXEL_SIDE, _PIXEL_SIDE), Image.Resampling.BOX)
    return np.asarray(resized, dtype=np.float32)
