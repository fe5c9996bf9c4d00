"""backbone: network, manifest and registered model follow from one description."""

from __future__ import annotations

import inspect
import json
from typing import Any

import pytest
import torch

from dinov2_core.backbones import build_network
from dinov2_core.config.backbone import ARCHITECTURES, Backbone, Dimensions, TeacherConfig
from dinov2_core.errors import InputError
from dinov2_core.vit.transformer import VisionTransformer

TEACHER = TeacherConfig(
    backbone=Backbone(
        architecture=Dimensions(embed_dim=32, depth=2, num_heads=4, mlp_ratio=3.0),
        patch_size_pixels=8,
        num_channels=1,
        feed_forward="swiglu",
        num_register_tokens=3,
        layer_scale=0.5,
        position_offset=0.1,
        position_antialias=False,
    ),
    image_size_pixels=32,
    mean=(0.25,),
    standard_deviation=(0.5,),
)


def test_settings_are_named_like_the_networks_arguments() -> None:
    arguments = TEACHER.backbone.network_arguments(image_size_pixels=32)
    assert set(arguments) == set(inspect.signature(VisionTransformer).parameters)
    assert json.loads(json.dumps(arguments)) == arguments


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_name_gives_a_network_with_as_many_tokens_as_it_says(name: Any) -> None:
    backbone = Backbone(architecture=name, num_register_tokens=4)
    with torch.device("meta"):
        network = build_network(backbone.network_arguments(image_size_pixels=28))
    features = network.features(torch.empty(1, 3, 42, 42, device="meta"))
    num_tokens = 1 + features.registers.shape[1] + features.patches.shape[1]
    assert num_tokens == backbone.num_tokens(42) == 1 + 4 + 9
    assert len(network.blocks) == ARCHITECTURES[name].depth


def test_a_registered_model_gives_the_description_back() -> None:
    text = json.dumps(TEACHER.registered_form()).encode()
    assert TeacherConfig.of_registered(text, source="here") == TEACHER


def test_a_model_registered_by_an_earlier_version_is_read() -> None:
    described = TEACHER.registered_form()
    del described["architecture"]["layer_scale"], described["architecture"]["drop_path_rate"]
    found = TeacherConfig.of_registered(json.dumps(described).encode(), source="here")
    assert found.backbone.layer_scale == 1e-5
    assert found.backbone.dimensions == TEACHER.backbone.dimensions


@pytest.mark.parametrize("text", [b"{", b"[]", b"{}", b"\xff", b'{"architecture": 3}'])
def test_other_documents_are_refused(text: bytes) -> None:
    with pytest.raises(InputError, match="here does not describe a teacher"):
        TeacherConfig.of_registered(text, source="here")
    described = TEACHER.registered_form()
    described["architecture"]["num_heads"] = 5
    with pytest.raises(InputError, match="num_heads 5"):
        TeacherConfig.of_registered(json.dumps(described).encode(), source="here")
