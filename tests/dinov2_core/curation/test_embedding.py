"""embedding: unit vectors, a function of each image alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import nn

from dinov2_core.curation.embedding import (
    Embedder,
    ModuleEmbedder,
    PixelEmbedder,
    timm_embedder,
    torchscript_embedder,
    unit_rows,
)
from dinov2_core.errors import InputError

CPU = torch.device("cpu")


def pictures(number: int) -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [
        Image.fromarray(rng.integers(0, 256, (20 + i, 30, 3), dtype=np.uint8))
        for i in range(number)
    ]


def embed(embedder: Embedder, images: list[Image.Image]) -> NDArray[np.float32]:
    return embedder.embed([embedder.prepare(image) for image in images])


def colours() -> ModuleEmbedder:
    return ModuleEmbedder(
        nn.Identity(),
        image_size_pixels=8,
        mean=(0.5, 0.5, 0.5),
        standard_deviation=(0.5, 0.25, 0.5),
        device=CPU,
        batch_size=2,
    )


@pytest.mark.parametrize("embedder", [PixelEmbedder(), colours()])
def test_vectors_have_length_one_and_do_not_depend_on_the_batch(embedder: Embedder) -> None:
    inputs = [embedder.prepare(image) for image in pictures(5)]
    vectors = embedder.embed(inputs)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(embedder.embed(inputs[3:4])[0], vectors[3], atol=1e-6)


def test_modules_get_normalised_colours() -> None:
    image = Image.new("RGB", (9, 9), (255, 0, 51))
    expected = np.array([1.0, -2.0, -0.6])
    (vector,) = embed(colours(), [image])
    np.testing.assert_allclose(vector, expected / np.linalg.norm(expected), rtol=1e-5)


@pytest.mark.parametrize("embedder", [PixelEmbedder(), colours()])
def test_gray_images_are_embedded_as_the_same_gray_in_colours(embedder: Embedder) -> None:
    gray = [image.convert("L") for image in pictures(9)]
    for image in gray:
        expected = embedder.prepare(image.convert("RGB"))
        np.testing.assert_array_equal(embedder.prepare(image), expected)


def test_pixels_measure_similarity() -> None:
    image, other = pictures(2)
    small = image.resize((60, 40), Image.Resampling.BICUBIC)
    brighter = image.point(lambda value: value // 2 + 100)
    vectors = embed(PixelEmbedder(), [image, small, brighter, other])
    similarity = vectors @ vectors[0]
    assert similarity[1] > 0.8
    assert similarity[2] > 0.99
    assert similarity[3] < 0.5


def test_the_vector_of_a_flat_image_is_zero() -> None:
    assert not embed(PixelEmbedder(), [Image.new("L", (5, 5), 7)]).any()
    assert unit_rows(np.zeros((2, 3), dtype=np.float32)).tolist() == [[0, 0, 0], [0, 0, 0]]


def test_timm_weights_come_from_a_file(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = timm.create_model("test_vit", pretrained=False)
    torch.save(module.state_dict(), tmp_path / "weights.pt")
    embedder = timm_embedder(
        "test_vit", weights=tmp_path / "weights.pt", image_size_pixels=160, device=CPU
    )
    (vector,) = embed(embedder, pictures(1))
    pixels = np.array(pictures(1)[0].resize((160, 160), Image.Resampling.BICUBIC))
    batch = torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255
    mean, deviation = (
        torch.tensor(module.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std")
    )
    with torch.inference_mode():
        module.eval()
        features = module.forward_head(
            module.forward_features((batch - mean) / deviation), pre_logits=True
        )
    expected = nn.functional.normalize(features, dim=1)[0].numpy()
    np.testing.assert_allclose(vector, expected, atol=1e-5)


@pytest.mark.parametrize("content", ["other", "truncated", "text", "missing"])
def test_weights_that_do_not_fit_are_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "weights.pt"
    if content == "text":
        path.write_text("no weights")
    elif content != "missing":
        torch.save(nn.Linear(2, 2).state_dict(), path)
    if content == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(
        InputError, match=r"weights\.pt does not hold the weights of timm's test_vit"
    ):
        timm_embedder("test_vit", weights=path, image_size_pixels=160, device=CPU)
    with pytest.raises(InputError, match=r"weights\.pt cannot be loaded as TorchScript"):
        torchscript_embedder(path, image_size_pixels=160, device=CPU)


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
def test_torchscript_feature_maps_are_averaged(tmp_path: Path) -> None:
    module = torch.jit.trace(nn.Conv2d(3, 4, 3), torch.rand(1, 3, 16, 16))  # type: ignore[no-untyped-call]
    module.save(str(tmp_path / "module.pt"))
    embedder = torchscript_embedder(tmp_path / "module.pt", image_size_pixels=16, device=CPU)
    assert embed(embedder, pictures(3)).shape == (3, 4)
