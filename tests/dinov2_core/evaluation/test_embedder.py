"""embedder: image files to what the network itself gives."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from dinov2_core.config.backbone import Backbone, Dimensions, TeacherConfig
from dinov2_core.errors import InputError
from dinov2_core.evaluation.embedder import TeacherEmbedder
from dinov2_core.evaluation.labelled_set import EncodedImage
from dinov2_core.evaluation.preprocessing import (
    Preprocessing,
    decode,
    normalise,
    resize_and_crop,
)
from tests.dinov2_core.weights.networks import network, weights_of

CPU = torch.device("cpu")
TEACHER = TeacherConfig(
    backbone=Backbone(
        architecture=Dimensions(embed_dim=24, depth=3, num_heads=2),
        patch_size_pixels=4,
        num_register_tokens=4,
    ),
    image_size_pixels=16,
    mean=(0.5, 0.4, 0.3),
    standard_deviation=(0.2, 0.3, 0.4),
)
NETWORK = network("mlp", 4)


def embedder(teacher: TeacherConfig = TEACHER) -> TeacherEmbedder:
    return TeacherEmbedder(teacher.registered_form(), weights_of(NETWORK), device=CPU)


def jpeg(width: int, height: int) -> bytes:
    pixels = np.random.default_rng(width).integers(0, 256, (height, width, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG")
    return buffer.getvalue()


@torch.no_grad()
def test_files_are_embedded_as_the_evaluation_measures_them() -> None:
    contents = [jpeg(16, 16), jpeg(50, 30), jpeg(7, 90)]
    preprocessing = Preprocessing(
        size_pixels=16, mean=TEACHER.mean, standard_deviation=TEACHER.standard_deviation
    )
    pixels = [
        resize_and_crop(
            decode(EncodedImage(name="x", content=content), num_channels=3),
            preprocessing=preprocessing,
        )
        for content in contents
    ]
    features = NETWORK.features(normalise(np.stack(pixels), preprocessing=preprocessing))
    found = embedder()
    decoded = np.stack([found.decoded(content) for content in contents])
    np.testing.assert_array_equal(found.embed_pixels(decoded), features.cls)
    both = torch.cat([features.cls, features.patches.mean(dim=1)], dim=1)
    np.testing.assert_array_equal(found.embed_pixels(decoded, output="cls+patch_mean"), both)


def test_a_file_above_the_limit_is_refused_before_it_is_decoded() -> None:
    with pytest.raises(Exception, match="50 x 30 is more than max_pixels 1499"):
        embedder().decoded(jpeg(50, 30), max_pixels=1499)


def test_weights_of_another_network_are_refused() -> None:
    other = TEACHER.model_copy(update={"image_size_pixels": 20})
    with pytest.raises(InputError, match="pos_embed has shape"):
        embedder(other)
    described = TEACHER.registered_form()
    described["preprocessing"]["standard_deviation"] = [0.0, 1.0, 1.0]
    with pytest.raises(InputError, match="description of the teacher is wrong .*positive"):
        TeacherEmbedder(described, weights_of(NETWORK), device=CPU)
