"""A teacher's backbone with its preprocessing: image files in, embeddings out.

A registered model carries this file and all that it imports: torch, numpy and Pillow alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dinov2_core.backbones import build_network
from dinov2_core.data.decoding import MAX_PIXELS, open_image
from dinov2_core.errors import InputError
from dinov2_core.evaluation.preprocessing import Preprocessing, normalise, resize_and_crop
from dinov2_core.weights.loading import load_weights

Output = Literal["cls", "cls+patch_mean"]
OUTPUTS: tuple[Output, ...] = get_args(Output)


class TeacherEmbedder:
    """Embeds images; what it does to them is what the evaluation did before registering.

    Args:
        described: Sections `architecture` and `preprocessing`; `TeacherConfig.registered_form`.
        weights: Of the backbone, by the reference's names.
        device: Where the network runs.

    Raises:
        InputError: A section is missing or wrong, or the weights do not fit.
    """

    def __init__(
        self,
        described: Mapping[str, Any],
        weights: Mapping[str, Tensor],
        *,
        device: torch.device,
    ) -> None:
        try:
            architecture, preprocessing = described["architecture"], described["preprocessing"]
            self.preprocessing = Preprocessing(
                size_pixels=preprocessing["size_pixels"],
                mean=tuple(preprocessing["mean"]),
                standard_deviation=tuple(preprocessing["standard_deviation"]),
            )
            with torch.device("meta"):  # its weights come from the file
                network = build_network(architecture)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise InputError(
                f"the description of the teacher is wrong ({type(error).__name__}: {error}); "
                "register it again"
            ) from error
        self.network = network.to_empty(device=device).eval().requires_grad_(False)
        load_weights(self.network, weights, source="the teacher's weights")
        self.device = device
        self.num_channels = self.preprocessing.num_channels
        self.patch_size_pixels: int = architecture["patch_size_pixels"]
        self.embed_dim: int = architecture["embed_dim"]
        self._check_sizes(architecture["num_channels"])

    def _check_sizes(self, num_channels: int) -> None:
        size, patch = self.preprocessing.size_pixels, self.patch_size_pixels
        if size % patch or num_channels != self.num_channels:
            raise InputError(
                f"preprocessing with size_pixels {size} and {self.num_channels} channels does not "
                f"fit the architecture's patch_size_pixels {patch} and num_channels "
                f"{num_channels}; register the teacher again"
            )

    def decoded(self, content: bytes, *, max_pixels: int = MAX_PIXELS) -> NDArray[np.uint8]:
        """The square [S, S, C] of an encoded image that the network gets.

        Args:
            content: The file's bytes.
            max_pixels: Width times height above which the image is refused before it is decoded.

        Raises:
            UnreadableImage: The bytes are no image, are cut off, or hold too many pixels.
        """
        image = open_image(content, num_channels=self.num_channels, max_pixels=max_pixels)
        image = image.convert("L" if self.num_channels == 1 else "RGB")
        return resize_and_crop(image, preprocessing=self.preprocessing)

    def embed_pixels(
        self, pixels: NDArray[np.uint8], *, output: Output = "cls"
    ) -> NDArray[np.float32]:
        """Embeddings [B, D], or [B, 2 D] with the patch mean, of pixels [B, S, S, C]."""
        return self.embed(normalise(pixels, preprocessing=self.preprocessing), output=output)

    @torch.inference_mode()
    def embed(self, images: Tensor, *, output: Output = "cls") -> NDArray[np.float32]:
        """Embeddings [B, D] or [B, 2 D] of normalised images [B, C, H, W]."""
        features = self.network.features(images.to(self.device))
        embedded = features.cls
        if output == "cls+patch_mean":
            embedded = torch.cat([embedded, features.patches.mean(dim=1)], dim=1)
        embeddings: NDArray[np.float32] = embedded.cpu().numpy()
        return embeddings
