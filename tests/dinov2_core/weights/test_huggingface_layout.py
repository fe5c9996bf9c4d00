"""huggingface_layout: the names of Dinov2Model, both ways."""

from __future__ import annotations

import pytest
import torch

from dinov2_core.vit.feed_forward import FeedForward
from dinov2_core.weights.huggingface_layout import (
    from_huggingface,
    is_huggingface,
    to_huggingface,
)
from tests.dinov2_core.weights.networks import KINDS, network, weights_of

# Names of a checkpoint of facebook/dinov2-small, one layer of them.
RELEASED = """
embeddings.cls_token embeddings.mask_token embeddings.position_embeddings
embeddings.patch_embeddings.projection.weight embeddings.patch_embeddings.projection.bias
encoder.layer.0.norm1.weight encoder.layer.0.norm1.bias
encoder.layer.0.attention.attention.query.weight encoder.layer.0.attention.attention.query.bias
encoder.layer.0.attention.attention.key.weight encoder.layer.0.attention.attention.key.bias
encoder.layer.0.attention.attention.value.weight encoder.layer.0.attention.attention.value.bias
encoder.layer.0.attention.output.dense.weight encoder.layer.0.attention.output.dense.bias
encoder.layer.0.layer_scale1.lambda1
encoder.layer.0.norm2.weight encoder.layer.0.norm2.bias
encoder.layer.0.mlp.fc1.weight encoder.layer.0.mlp.fc1.bias
encoder.layer.0.mlp.fc2.weight encoder.layer.0.mlp.fc2.bias
encoder.layer.0.layer_scale2.lambda1
layernorm.weight layernorm.bias
"""


@pytest.mark.parametrize(("feed_forward", "num_registers"), KINDS)
def test_names_there_and_back_give_every_bit(feed_forward: FeedForward, num_registers: int) -> None:
    weights = weights_of(network(feed_forward, num_registers))
    theirs = to_huggingface(weights)
    assert is_huggingface(theirs)
    assert not is_huggingface(weights)
    back = from_huggingface(theirs)
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[name], weights[name]) for name in weights)


def test_names_are_those_of_the_released_files() -> None:
    names = to_huggingface(weights_of(network("mlp", 0)))
    first = {name for name in names if "layer.1." not in name and "layer.2." not in name}
    assert first == set(RELEASED.split())
    gated = to_huggingface(weights_of(network("swiglu", 4)))
    assert "encoder.layer.2.mlp.weights_in.weight" in gated
    assert "encoder.layer.2.mlp.weights_out.bias" in gated
    assert gated["embeddings.register_tokens"].shape == (1, 4, 24)


def test_query_key_and_value_are_stacked_in_this_order() -> None:
    names = [f"encoder.layer.7.attention.attention.{part}.bias" for part in ("query", "key")]
    parts = {name: torch.full((2,), float(i)) for i, name in enumerate(names)}
    assert from_huggingface(parts).keys() == parts.keys()  # one is absent: nothing to stack
    parts["encoder.layer.7.attention.attention.value.bias"] = torch.full((2,), 2.0)
    assert from_huggingface(parts)["blocks.7.attn.qkv.bias"].tolist() == [0, 0, 1, 1, 2, 2]


def test_names_that_are_not_known_stay() -> None:
    strange = {"classifier.weight": torch.ones(1), "encoder.layer.0.adapter.weight": torch.ones(1)}
    assert from_huggingface(strange).keys() == strange.keys()
