"""layouts: the same teacher comes out, however it was saved."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

from dinov2_core.errors import InputError
from dinov2_core.heads import DINOHead
from dinov2_core.weights.huggingface_layout import to_huggingface
from dinov2_core.weights.layouts import StartingWeights, with_own_names
from dinov2_core.weights.reading import StateDict
from dinov2_core.weights.timm_layout import to_timm
from tests.dinov2_core.weights.networks import network, weights_of

Weights = dict[str, Tensor]
BACKBONE = weights_of(network("mlp", 0))


def found(tensors: Weights) -> StartingWeights:
    return with_own_names(StateDict(source="here", tensors=tensors, left_out=("optimizer",)))


def prefixed(prefix: str, tensors: Weights) -> Weights:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def chunked(tensors: Weights) -> Weights:
    """As the reference saves a network of two chunks: chunk, then the block counted in all."""
    return {
        re.sub(r"^blocks\.(\d+)", lambda m: f"blocks.{int(m[1]) // 2}.{m[1]}", name): tensor
        for name, tensor in tensors.items()
    }


def head() -> Weights:
    module = DINOHead(in_dim=24, hidden_dim=8, bottleneck_dim=4, num_prototypes=6)
    return {name: tensor.detach() for name, tensor in module.named_parameters()}


HEADS = prefixed("dino_head.", head()) | prefixed("ibot_head.", head())
TEACHER = prefixed("backbone.", BACKBONE) | HEADS


@pytest.mark.parametrize(
    ("tensors", "expected", "layout"),
    [
        (BACKBONE, prefixed("backbone.", BACKBONE), "reference"),
        (chunked(BACKBONE), prefixed("backbone.", BACKBONE), "reference"),
        (prefixed("module.", BACKBONE), prefixed("backbone.", BACKBONE), "reference"),
        (prefixed("backbone.", chunked(BACKBONE)) | HEADS, TEACHER, "reference"),
        (prefixed("teacher.module.", TEACHER), TEACHER, "reference"),
        (prefixed("module.teacher.", TEACHER), TEACHER, "reference"),
        (
            prefixed("teacher.", prefixed("backbone._orig_mod.", BACKBONE) | HEADS),
            TEACHER,
            "reference",
        ),
        (to_huggingface(BACKBONE), prefixed("backbone.", BACKBONE), "huggingface"),
        (
            prefixed("dinov2.", to_huggingface(BACKBONE)),
            prefixed("backbone.", BACKBONE),
            "huggingface",
        ),
        (
            prefixed("backbone.", to_huggingface(BACKBONE)),
            prefixed("backbone.", BACKBONE),
            "huggingface",
        ),
    ],
)
def test_the_same_weights_come_out(tensors: Weights, expected: Weights, layout: str) -> None:
    weights = found(tensors)
    assert weights.layout == layout
    assert weights.weights.keys() == expected.keys()
    assert all(torch.equal(weights.weights[name], expected[name]) for name in expected)
    assert weights.left_out == ("optimizer",)
    assert weights.has_head("ibot_head") == ("ibot_head.mlp.0.bias" in expected)
    assert weights.backbone.keys() == BACKBONE.keys()


def test_a_network_of_timm_lacks_only_the_mask_token() -> None:
    weights = found(to_timm(BACKBONE))
    assert weights.layout == "timm"
    assert set(BACKBONE) - set(weights.backbone) == {"mask_token"}
    assert weights.absent == ("backbone.mask_token",)


def test_a_classifier_of_hugging_face_is_left_out() -> None:
    classifier = {"classifier.weight": torch.ones(2, 48), "classifier.bias": torch.ones(2)}
    weights = found(prefixed("dinov2_with_registers.", to_huggingface(BACKBONE)) | classifier)
    assert weights.backbone.keys() == BACKBONE.keys()
    assert weights.left_out == ("optimizer", "classifier.weight", "classifier.bias")


def test_the_student_and_the_centres_are_left_out() -> None:
    state = prefixed("teacher.", TEACHER) | prefixed("student.", TEACHER)
    state |= {"dino_loss.center": torch.ones(1, 6), "strange": torch.ones(1)}
    weights = found(state)
    assert weights.weights.keys() == TEACHER.keys() | {"strange"}
    assert weights.left_out == (
        "optimizer",
        *(f"student.{name}" for name in TEACHER),
        "dino_loss.center",
    )


def test_prototypes_of_the_newer_weight_normalisation_are_renamed() -> None:
    path = "dino_head.last_layer.parametrizations.weight.original"
    state = prefixed("backbone.", BACKBONE) | {
        f"{path}0": torch.ones(6, 1),
        f"{path}1": torch.ones(6, 4),
    }
    heads = {name for name in found(state).weights if name.startswith("dino_head.")}
    assert heads == {"dino_head.last_layer.weight_g", "dino_head.last_layer.weight_v"}


def test_a_weight_that_is_there_twice_is_refused() -> None:
    with pytest.raises(InputError, match=r"here holds norm\.bias more than once"):
        found(BACKBONE | {"module.norm.bias": torch.ones(24)})
