"""The registered teacher: images in, cls embeddings out; copied alone into the model version.

MLflow runs this file wherever the model is loaded, so it imports nothing of this project. Beside
it lie two artifacts: `weights`, a safetensors file with the names of the reference implementation,
and `config`, a JSON object with the sections `architecture` and `preprocessing`.
"""

from __future__ import annotations

import base64
import io
import json
import struct
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import mlflow.models
import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from mlflow.pyfunc.model import PythonModel, PythonModelContext
from numpy.typing import NDArray
from PIL import Image, ImageOps
from safetensors.torch import load_file
from torch import Tensor

IMAGE_COLUMN = "image"
Items = Sequence[object] | NDArray[Any]
OUTPUTS = ("cls", "cls+patch_mean")
FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "GIF", "BMP", "DIB", "PPM", "JPEG2000", "AVIF", "ICO")
_DAMAGE = (OSError, EOFError, ValueError, SyntaxError, TypeError, LookupError, RuntimeError)


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """Numbers of the vision transformer, the section `architecture`."""

    embed_dim: int
    depth: int
    num_heads: int
    mlp_ratio: float
    feed_forward: Literal["mlp", "swiglu"]
    patch_size_pixels: int
    num_register_tokens: int
    num_channels: int
    position_offset: float
    position_antialias: bool
    image_size_pixels: int

    @property
    def grid(self) -> int:
        """Patches along a side of the grid that the positions were learned on."""
        return self.image_size_pixels // self.patch_size_pixels

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return name and shape of every tensor that the weights must hold."""
        dim, patch = self.embed_dim, self.patch_size_pixels
        shapes: dict[str, tuple[int, ...]] = {
            "cls_token": (1, 1, dim),
            "pos_embed": (1, 1 + self.grid**2, dim),
            "mask_token": (1, dim),
            "patch_embed.proj.weight": (dim, self.num_channels, patch, patch),
            "patch_embed.proj.bias": (dim,),
            "norm.weight": (dim,),
            "norm.bias": (dim,),
        }
        if self.num_register_tokens:
            shapes["register_tokens"] = (1, self.num_register_tokens, dim)
        for index in range(self.depth):
            block = self._block_shapes()
            shapes |= {f"blocks.{index}.{name}": shape for name, shape in block.items()}
        return shapes

    def _block_shapes(self) -> dict[str, tuple[int, ...]]:
        dim, hidden = self.embed_dim, int(self.embed_dim * self.mlp_ratio)
        layers: dict[str, tuple[int, ...]] = {"norm1": (dim,), "norm2": (dim,)}
        layers |= {"attn.qkv": (3 * dim, dim), "attn.proj": (dim, dim)}
        if self.feed_forward == "swiglu":
            hidden = (int(hidden * 2 / 3) + 7) // 8 * 8
            layers |= {"mlp.w12": (2 * hidden, dim), "mlp.w3": (dim, hidden)}
        else:
            layers |= {"mlp.fc1": (hidden, dim), "mlp.fc2": (dim, hidden)}
        shapes: dict[str, tuple[int, ...]] = {"ls1.gamma": (dim,), "ls2.gamma": (dim,)}
        for name, shape in layers.items():
            shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
        return shapes


@dataclass(frozen=True, slots=True, kw_only=True)
class Preprocessing:
    """Size and normalisation of the images, the section `preprocessing`."""

    size_pixels: int
    mean: list[float]
    standard_deviation: list[float]


class Backbone:
    """A vision transformer for inference; arXiv:2304.07193, registers arXiv:2309.16588."""

    def __init__(self, architecture: Architecture, weights: dict[str, Tensor]) -> None:
        self.architecture = architecture
        self.weights = weights
        self._positions: dict[tuple[int, int], Tensor] = {}

    def tokens(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Turn normalised images [B, C, H, W] into cls [B, D] and patch tokens [B, N, D]."""
        weights, patch = self.weights, self.architecture.patch_size_pixels
        height, width = images.shape[2] // patch, images.shape[3] // patch
        kernel = weights["patch_embed.proj.weight"]
        embedded = F.conv2d(images, kernel, weights["patch_embed.proj.bias"], stride=patch)
        patches = embedded.flatten(2).transpose(1, 2)  # [B, N, D]
        cls = weights["cls_token"].expand(len(images), -1, -1)
        x = torch.cat([cls, patches], dim=1) + self._position(height, width)
        if self.architecture.num_register_tokens:
            registers = weights["register_tokens"].expand(len(images), -1, -1)
            x = torch.cat([x[:, :1], registers, x[:, 1:]], dim=1)  # [B, 1 + R + N, D]
        for index in range(self.architecture.depth):
            x = self._block(x, name=f"blocks.{index}")
        x = self._norm(x, name="norm")
        return x[:, 0], x[:, 1 + self.architecture.num_register_tokens :]

    def _block(self, x: Tensor, *, name: str) -> Tensor:
        attended = self._attention(self._norm(x, name=f"{name}.norm1"), name=f"{name}.attn")
        x = x + attended * self.weights[f"{name}.ls1.gamma"]
        fed = self._feed_forward(self._norm(x, name=f"{name}.norm2"), name=f"{name}.mlp")
        return x + fed * self.weights[f"{name}.ls2.gamma"]

    def _attention(self, x: Tensor, *, name: str) -> Tensor:
        batch, length, dim = x.shape
        heads = self.architecture.num_heads
        qkv = self._linear(x, name=f"{name}.qkv").view(batch, length, 3, heads, dim // heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # [B, heads, tokens, D / heads] each
        attended = F.scaled_dot_product_attention(query, key, value)
        return self._linear(attended.transpose(1, 2).flatten(2), name=f"{name}.proj")

    def _feed_forward(self, x: Tensor, *, name: str) -> Tensor:
        if self.architecture.feed_forward == "swiglu":
            gate, up = self._linear(x, name=f"{name}.w12").chunk(2, dim=-1)
            return self._linear(F.silu(gate) * up, name=f"{name}.w3")
        return self._linear(F.gelu(self._linear(x, name=f"{name}.fc1")), name=f"{name}.fc2")

    def _linear(self, x: Tensor, *, name: str) -> Tensor:
        return F.linear(x, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"])

    def _norm(self, x: Tensor, *, name: str) -> Tensor:
        weight, bias = self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]
        return F.layer_norm(x, weight.shape, weight, bias, eps=1e-6)

    def _position(self, height: int, width: int) -> Tensor:
        """Positions [1, 1 + h * w, D] of a grid, resampled where it is not the learned one."""
        if (height, width) not in self._positions:
            self._positions[height, width] = self._resampled_position(height, width)
        return self._positions[height, width]

    def _resampled_position(self, height: int, width: int) -> Tensor:
        learned, grid = self.weights["pos_embed"], self.architecture.grid
        if (height, width) == (grid, grid):
            return learned
        offset = self.architecture.position_offset
        scales = ((height + offset) / grid, (width + offset) / grid)
        patches = F.interpolate(
            learned[:, 1:].reshape(1, grid, grid, -1).permute(0, 3, 1, 2),
            size=None if offset else (height, width),
            scale_factor=scales if offset else None,
            mode="bicubic",
            antialias=self.architecture.position_antialias,
        )  # [1, D, h, w]
        return torch.cat([learned[:, :1], patches.flatten(2).transpose(1, 2)], dim=1)


class TeacherModel(PythonModel):
    """Embeds images with the teacher's backbone, on the GPU where there is one.

    Accepted by `predict`: a DataFrame with the column `image` (or with a single column of any
    name), a Series, a list, or one item; an item is a path, the bytes of an image file, or those
    bytes as base64 text. A string is a path where that file exists, base64 otherwise. Arrays:
    uint8 [B, H, W, C] is preprocessed like a file, float [B, C, H, W] must be normalised already.

    Params: `batch_size`, images per forward pass (64), and `output`: "cls" gives [B, D],
    "cls+patch_mean" [B, 2 D].
    """

    def load_context(self, context: PythonModelContext) -> None:
        """Read configuration and weights, and hold the one against the other."""
        config = json.loads(Path(context.artifacts["config"]).read_bytes())
        self.architecture = Architecture(**_section(config, "architecture", Architecture))
        values = _section(config, "preprocessing", Preprocessing)
        self.preprocessing = Preprocessing(**values)
        size, patch = self.preprocessing.size_pixels, self.architecture.patch_size_pixels
        if size % patch:
            raise ValueError(
                f"preprocessing.size_pixels {size} of the artifact config is not divisible by "
                f"architecture.patch_size_pixels {patch}; register with a multiple of {patch}"
            )
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        weights = load_file(context.artifacts["weights"], device=str(self.device))
        _check_weights(weights, self.architecture.shapes())
        floats = {name: tensor.float() for name, tensor in weights.items()}
        self.backbone = Backbone(self.architecture, floats)
        self._embed(np.zeros((1, self.architecture.num_channels, size, size), np.float32), "cls")

    def predict(  # the annotation names the form that is served; the others pass as they are
        self,
        context: PythonModelContext | None,  # noqa: ARG002
        model_input: pd.DataFrame,
        params: dict[str, Any] | None = None,
    ) -> NDArray[np.float32]:
        """Return embeddings, float32 [B, D] or [B, 2 D]; see the class for what goes in.

        Raises:
            ValueError: An item cannot be read as an image, or a parameter is unknown.
        """
        batch_size, output = _parameters(params or {})
        items = _items(model_input)
        starts = range(0, len(items), batch_size)
        parts = [
            self._embed(self._normalised(items[start : start + batch_size], first=start), output)
            for start in starts
        ]
        width = self.architecture.embed_dim * (1 if output == "cls" else 2)
        return np.concatenate([np.zeros((0, width), np.float32), *parts])

    @torch.inference_mode()
    def _embed(self, images: NDArray[np.float32], output: str) -> NDArray[np.float32]:
        cls, patches = self.backbone.tokens(torch.from_numpy(images).to(self.device))
        embedded = cls if output == "cls" else torch.cat([cls, patches.mean(dim=1)], dim=1)
        embeddings: NDArray[np.float32] = embedded.cpu().numpy()
        return embeddings

    def _normalised(self, items: Items, *, first: int) -> NDArray[np.float32]:
        """Turn items or an array into normalised images [B, C, H, W]."""
        if isinstance(items, np.ndarray) and items.dtype.kind == "f":
            return self._checked(np.ascontiguousarray(items, dtype=np.float32))
        channels = self.architecture.num_channels
        images = [_image(item, first + index, channels) for index, item in enumerate(items)]
        size = self.preprocessing.size_pixels
        squares = np.stack([_resize_and_crop(image, size) for image in images])
        scaled = squares.reshape(-1, size, size, channels).astype(np.float32) / np.float32(255)
        means, deviations = self.preprocessing.mean, self.preprocessing.standard_deviation
        normalised = (scaled - np.asarray(means, np.float32)) / np.asarray(deviations, np.float32)
        return np.ascontiguousarray(normalised.transpose(0, 3, 1, 2))

    def _checked(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        channels, patch = self.architecture.num_channels, self.architecture.patch_size_pixels
        height, width = images.shape[2:]
        if images.shape[1] != channels or height % patch or width % patch or not height * width:
            raise ValueError(
                f"float array has shape {list(images.shape)}; give normalised images [B, C, H, W] "
                f"with C = {channels} and H and W multiples of {patch}, or uint8 [B, H, W, C]"
            )
        return images


def _section(config: Any, name: str, kind: type[Architecture | Preprocessing]) -> dict[str, Any]:
    """Return one section of the configuration, its keys held against the fields expected."""
    section = config.get(name) if isinstance(config, dict) else None
    expected = {field.name for field in fields(kind)}
    if not isinstance(section, dict) or set(section) != expected:
        found = sorted(section) if isinstance(section, dict) else section
        raise ValueError(
            f"section {name} of the artifact config has {found}, expected exactly "
            f"{sorted(expected)}; register the model again with a complete teacher.json"
        )
    return section


def _check_weights(weights: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
    missing, unexpected = sorted(set(shapes) - set(weights)), sorted(set(weights) - set(shapes))
    differing = [
        f"{name} {list(weights[name].shape)} instead of {list(shape)}"
        for name, shape in shapes.items()
        if name in weights and tuple(weights[name].shape) != shape
    ]
    if missing or unexpected or differing:
        raise ValueError(
            f"the artifact weights does not fit section architecture of config: missing {missing}, "
            f"unexpected {unexpected}, differing shapes {differing}; register both from one export"
        )


def _parameters(params: Mapping[str, Any]) -> tuple[int, str]:
    batch_size, output = params.get("batch_size", 64), params.get("output", "cls")
    if not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"params batch_size {batch_size!r} is no integer of at least 1")
    if output not in OUTPUTS:
        raise ValueError(f"params output {output!r} is unknown; choose one of {list(OUTPUTS)}")
    return batch_size, output


def _items(model_input: object) -> Items:
    """Return a list of items, or a numeric array [B, ...] that stands for images."""
    if isinstance(model_input, Mapping):
        model_input = pd.DataFrame({name: pd.Series(list(v)) for name, v in model_input.items()})
    if isinstance(model_input, pd.DataFrame):
        columns = list(model_input.columns)
        if IMAGE_COLUMN not in columns and len(columns) != 1:
            raise ValueError(
                f"the data frame has the columns {columns}; put the images into one column named "
                f"{IMAGE_COLUMN!r}"
            )
        model_input = model_input[IMAGE_COLUMN if IMAGE_COLUMN in columns else columns[0]]
    if isinstance(model_input, pd.Series | list | tuple):
        return list(model_input)
    if isinstance(model_input, str | bytes | Path):
        return [model_input]
    if isinstance(model_input, np.ndarray):
        if model_input.ndim == 4 and (
            model_input.dtype == np.uint8 or model_input.dtype.kind == "f"
        ):
            return model_input
        if model_input.dtype.kind in "OUS" and model_input.ndim in (1, 2):
            return list(model_input.ravel().tolist())
        raise ValueError(
            f"array of type {model_input.dtype} and shape {list(model_input.shape)} is not "
            "accepted; give uint8 [B, H, W, C], normalised float [B, C, H, W], or paths or bytes"
        )
    raise ValueError(
        f"input of type {type(model_input).__name__} is not accepted; give a data frame with the "
        f"column {IMAGE_COLUMN!r}, a list of paths, bytes or base64 strings, or an array"
    )


def _image(item: object, index: int, num_channels: int) -> Image.Image:
    """Decode one item to grey or RGB; errors name its position."""
    try:
        if isinstance(item, np.ndarray):
            return _image_of_pixels(item, num_channels)
        with Image.open(io.BytesIO(_content(item)), formats=FORMATS) as image:
            upright = _eight_bit(ImageOps.exif_transpose(image))
            return upright.convert("L" if num_channels == 1 else "RGB")
    except (*_DAMAGE, struct.error, Image.DecompressionBombError) as error:
        shown = f"{item!r:.80}" if isinstance(item, str | Path) else type(item).__name__
        shown = f"{len(item)} bytes" if isinstance(item, bytes) else shown
        raise ValueError(
            f"item {index} (counted from 0; {shown}) cannot be read as an image: {error}; give a "
            "path that exists here, the bytes of a whole image file, or those bytes as base64"
        ) from error


def _eight_bit(image: Image.Image) -> Image.Image:
    """Lay transparency over white and scale wide integers, as in training."""
    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        values = np.asarray(image).astype(np.float64)
        if not np.isfinite(values).all():
            raise ValueError("the image holds values that are not finite")
        low, high = values.min(), values.max()
        if image.mode != "F" and low >= 0 and high <= 65_535:
            low, high = np.float64(0), np.float64(65_535)
        scaled = (values - low) * (255 / (high - low) if high > low else 0)
        return Image.fromarray(np.rint(scaled).astype(np.uint8))
    if image.has_transparency_data:
        opaque = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", opaque.size, "white"), opaque).convert("RGB")
    return image if image.mode in ("1", "L") else image.convert("RGB")


def _content(item: object) -> bytes:
    if isinstance(item, bytes | bytearray | memoryview):
        return bytes(item)
    if not isinstance(item, str | Path):
        raise ValueError(f"type {type(item).__name__} is neither path nor bytes nor base64 text")
    is_file = isinstance(item, Path)
    with suppress(OSError):  # base64 text may be too long for a file name
        is_file = is_file or Path(item).is_file()
    if is_file:
        return Path(item).read_bytes()
    try:
        return base64.b64decode("".join(str(item).split()), validate=True)
    except ValueError as error:
        raise ValueError("neither a file that exists here nor base64 text") from error


def _image_of_pixels(pixels: NDArray[Any], num_channels: int) -> Image.Image:
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != num_channels:
        raise ValueError(
            f"pixels of type {pixels.dtype} and shape {list(pixels.shape)} are not uint8 "
            f"[H, W, {num_channels}]"
        )
    return Image.fromarray(pixels[:, :, 0] if num_channels == 1 else pixels)


def _resize_and_crop(image: Image.Image, size: int) -> NDArray[np.uint8]:
    """Resize the shorter side and cut the centre, as the evaluation before registering did."""
    width, height = image.size
    shorter = min(width, height)
    target = size if shorter <= size else round(size * 256 / 224)
    if shorter != target:
        width, height = int(target * width / shorter), int(target * height / shorter)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = round((width - size) / 2), round((height - size) / 2)
    return np.asarray(image.crop((left, top, left + size, top + size)))


mlflow.models.set_model(TeacherModel())
