"""Embedders: images to unit vectors whose cosine measures how similar two images are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from dinov2_core.errors import InputError

_PIXEL_SIDE = 16


class Embedder(Protocol):
    """Turns images into unit vectors, in two steps: only small inputs wait for the second."""

    batch_size: int
    """Inputs that are embedded together."""

    def prepare(self, image: Image.Image) -> NDArray[np.uint8]:
        """Input [S, S, 3] of an image in mode `L` or `RGB`."""
        ...

    def embed(self, inputs: Sequence[NDArray[np.uint8]]) -> NDArray[np.float32]:
        """Unit vectors [N, E], each of its input alone."""
        ...


class PixelEmbedder:
    """16 x 16 colours and their gradients: no weights; compares appearance, not meaning."""

    batch_size = 512

    def prepare(self, image: Image.Image) -> NDArray[np.uint8]:
        """Mean colours of 16 x 16 cells, aspect ratio not kept."""
        return _resized(image, _PIXEL_SIDE, Image.Resampling.BOX)

    def embed(self, inputs: Sequence[NDArray[np.uint8]]) -> NDArray[np.float32]:
        """Unit vectors [N, 1248]; overall brightness does not count."""
        colours = np.stack(inputs).astype(np.float32)
        gray = colours.mean(axis=3)
        parts = (
            colours - colours.mean(axis=(1, 2, 3), keepdims=True),
            np.diff(gray, axis=1),
            np.diff(gray, axis=2),
        )
        return unit_rows(np.concatenate([part.reshape(len(inputs), -1) for part in parts], axis=1))


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
        """Wrap a network.

        Args:
            module: The network; put into evaluation mode and onto the device.
            image_size_pixels: Side S that images are resized to, aspect ratio not kept.
            mean: Subtracted per channel from values in [0, 1].
            standard_deviation: Divides per channel.
            device: Where the network runs.
            batch_size: Images per forward pass.
        """
        self.batch_size = batch_size
        self._module = module.eval().to(device)
        self._image_size_pixels = image_size_pixels
        self._mean = torch.tensor(mean).view(3, 1, 1)
        self._standard_deviation = torch.tensor(standard_deviation).view(3, 1, 1)
        self._device = device

    def prepare(self, image: Image.Image) -> NDArray[np.uint8]:
        """The image resized to the network's size (bicubic, antialiased)."""
        return _resized(image, self._image_size_pixels, Image.Resampling.BICUBIC)

    @torch.inference_mode()
    def embed(self, inputs: Sequence[NDArray[np.uint8]]) -> NDArray[np.float32]:
        """Unit vectors [N, E]; feature maps are averaged over positions."""
        pixels = torch.from_numpy(np.stack(inputs)).permute(0, 3, 1, 2).contiguous().float() / 255
        batch = (pixels - self._mean) / self._standard_deviation
        features: Tensor = self._module(batch.to(self._device))
        features = features.mean(dim=(2, 3)) if features.ndim == 4 else features
        return unit_rows(features.float().cpu().numpy())


def timm_embedder(
    name: str, *, weights: Path | None, image_size_pixels: int, device: torch.device
) -> ModuleEmbedder:
    """A network of timm without its classifier.

    Args:
        name: Model name of timm.
        weights: State dict of the same network on this machine; None downloads timm's own.
        image_size_pixels: Side that images are resized to.
        device: Where the network runs.

    Raises:
        InputError: The weights are damaged or of another network.
    """
    import timm

    module = timm.create_model(name, pretrained=weights is None, num_classes=0)
    if weights is not None:
        try:
            state = torch.load(weights, map_location="cpu", weights_only=True)
            classifier = str(module.pretrained_cfg.get("classifier", "")) + "."
            kept = {key: value for key, value in state.items() if not key.startswith(classifier)}
            module.load_state_dict(kept, strict=True)
        except (OSError, EOFError, RuntimeError, UnpicklingError, AttributeError) as error:
            raise InputError(
                f"{weights} does not hold the weights of timm's {name} ({error}); name a file with "
                "the state dict of that network in curate.embedding.weights"
            ) from error
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

    Raises:
        InputError: The file is missing or is no TorchScript.
    """
    try:
        module: nn.Module = torch.jit.load(path, map_location="cpu")  # type: ignore[no-untyped-call]
    except (RuntimeError, ValueError) as error:
        raise InputError(
            f"{path} cannot be loaded as TorchScript ({error}); name a file that torch.jit.save "
            "wrote in curate.embedding.path"
        ) from error
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


def _resized(image: Image.Image, side: int, resampling: Image.Resampling) -> NDArray[np.uint8]:
    """Square of three channels [side, side, 3]; gray is resized before it is repeated."""
    return np.array(image.resize((side, side), resampling).convert("RGB"))
