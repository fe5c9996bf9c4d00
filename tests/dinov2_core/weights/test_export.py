"""export: what is written loads elsewhere and gives the same."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import Tensor

from dinov2_core.config.backbone import ARCHITECTURES, Backbone, Dimensions, TeacherConfig
from dinov2_core.errors import InputError
from dinov2_core.vit.feed_forward import FeedForward
from dinov2_core.weights.export import write_export
from dinov2_core.weights.huggingface_layout import huggingface_files
from dinov2_core.weights.layouts import with_own_names
from dinov2_core.weights.reading import read_state_dict
from dinov2_core.weights.timm_layout import timm_architecture, timm_files
from tests.dinov2_core.weights.networks import KINDS, network, tokens_of, weights_of


def teacher_of(feed_forward: FeedForward = "mlp", num_registers: int = 0) -> TeacherConfig:
    return TeacherConfig(
        backbone=Backbone(
            architecture=Dimensions(embed_dim=24, depth=3, num_heads=2),
            patch_size_pixels=4,
            feed_forward=feed_forward,
            num_register_tokens=num_registers,
        ),
        image_size_pixels=16,
        mean=(0.5, 0.5, 0.5),
        standard_deviation=(0.2, 0.2, 0.2),
    )


def weights_for(feed_forward: FeedForward = "mlp", num_registers: int = 0) -> dict[str, Tensor]:
    return weights_of(network(feed_forward, num_registers))


@pytest.mark.parametrize(("feed_forward", "num_registers"), KINDS)
def test_timm_builds_the_network_from_the_files(
    tmp_path: Path, feed_forward: FeedForward, num_registers: int
) -> None:
    teacher, weights = (
        teacher_of(feed_forward, num_registers),
        weights_for(feed_forward, num_registers),
    )
    compared = write_export(teacher, weights, target="timm", directory=tmp_path)
    assert compared.startswith("timm's tokens differ by at most ")
    assert compared.endswith(" at 16 pixels")
    model = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    assert model.pretrained_cfg["mean"] == [0.5, 0.5, 0.5]
    again = network(feed_forward, num_registers, seed=3)
    found = with_own_names(read_state_dict(tmp_path / "model.safetensors")).backbone
    again.load_state_dict(found | {"mask_token": torch.zeros(1, 24)}, strict=True)
    torch.testing.assert_close(
        tokens_of(again), tokens_of(network(feed_forward, num_registers)), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize(("feed_forward", "num_registers"), KINDS)
def test_the_names_of_hugging_face_give_every_bit_back(
    tmp_path: Path, feed_forward: FeedForward, num_registers: int
) -> None:
    teacher, weights = (
        teacher_of(feed_forward, num_registers),
        weights_for(feed_forward, num_registers),
    )
    compared = write_export(teacher, weights, target="huggingface", directory=tmp_path)
    assert compared.endswith("transformers itself was not run")
    found = with_own_names(read_state_dict(tmp_path / "model.safetensors")).backbone
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[name], weights[name]) for name in weights)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config == huggingface_files(teacher)["config.json"]
    assert config["use_swiglu_ffn"] == (feed_forward == "swiglu")
    assert config.get("num_register_tokens", 0) == num_registers
    assert config["mlp_ratio"] == 4
    processor = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert processor["image_mean"] == [0.5, 0.5, 0.5]
    assert set(load_file(tmp_path / "model.safetensors")) != set(weights)


@pytest.mark.parametrize(
    ("architecture", "feed_forward", "registers", "name"),
    [
        ("vit_small", "mlp", 0, "vit_small_patch14_dinov2"),
        ("vit_base", "mlp", 4, "vit_base_patch14_reg4_dinov2"),
        ("vit_large", "mlp", 0, "vit_large_patch14_dinov2"),
        ("vit_giant2", "swiglu", 4, "vit_giant_patch14_reg4_dinov2"),
        ("vit_giant2", "mlp", 0, "vit_small_patch14_dinov2"),
        ("vit_large", "swiglu", 0, "vit_giant_patch14_dinov2"),
    ],
)
def test_known_sizes_have_timms_name_and_arguments(
    architecture: str, feed_forward: FeedForward, registers: int, name: str
) -> None:
    backbone = Backbone.model_validate(
        {
            "architecture": architecture,
            "feed_forward": feed_forward,
            "num_register_tokens": registers,
        }
    )
    assert timm_architecture(backbone) == name
    assert timm.is_model(name)
    gated = {"blocks.0.mlp.w3.weight": torch.empty(0, 4096)}
    teacher = TeacherConfig(
        backbone=backbone, image_size_pixels=518, mean=(0.0,), standard_deviation=(1.0,)
    )
    arguments = timm_files(teacher, gated)["config.json"]["model_args"]
    dim = ARCHITECTURES[architecture].embed_dim  # type: ignore[index]
    hidden = int(dim * arguments["mlp_ratio"])
    assert hidden == (8192 if feed_forward == "swiglu" else 4 * dim)


def test_weights_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    less = {name: tensor for name, tensor in weights_for().items() if name != "norm.bias"}
    with pytest.raises(InputError, match=r"the teacher lacks 1 parameters: norm\.bias"):
        write_export(teacher_of(), less, target="timm", directory=tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_files_are_readable_by_whom_the_umask_allows(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        write_export(teacher_of(), weights_for(), target="huggingface", directory=tmp_path)
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
    assert modes == dict.fromkeys(
        ("model.safetensors", "config.json", "preprocessor_config.json"), 0o644
    )


def test_other_resampling_is_reported(tmp_path: Path) -> None:
    teacher = teacher_of()
    backbone = teacher.backbone.model_copy(update={"position_offset": 0.1})
    compared = write_export(
        teacher.model_copy(update={"backbone": backbone}),
        weights_for(),
        target="timm",
        directory=tmp_path,
    )
    assert compared.endswith("at other sizes timm resamples positions in its own way")
