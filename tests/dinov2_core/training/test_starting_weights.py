"""starting_weights: every source fills student and teacher, or says what to change in the spec."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor

from dinov2_core.config.backbone import Backbone, Dimensions
from dinov2_core.config.objectives import DinoObjective, Head, IbotObjective, SharedHead
from dinov2_core.config.training import Crops, HeadWarmup, Optimization, TrainingConfig
from dinov2_core.errors import InputError
from dinov2_core.training.initialization import build_student_teacher
from dinov2_core.training.starting_weights import load_starting_weights
from dinov2_core.training.student_teacher import StudentTeacher
from dinov2_core.weights.huggingface_layout import to_huggingface
from dinov2_core.weights.loading import resample_to_side

HEAD = Head(num_prototypes=8, bottleneck_dim=4, hidden_dim=8)
CONFIG = TrainingConfig(
    backbone=Backbone(
        architecture=Dimensions(embed_dim=16, depth=2, num_heads=2), patch_size_pixels=4
    ),
    crops=Crops(global_crop_size_pixels=16, local_crop_size_pixels=8),
    dino=DinoObjective(head=HEAD),
    ibot=IbotObjective(head=HEAD),
    optimization=Optimization(num_steps=9, warmup_steps=1, freeze_prototypes_steps=1),
)
WARM = CONFIG.model_copy(update={"head_warmup": HeadWarmup(num_steps=2)})


def built(config: TrainingConfig = CONFIG, *, seed: int = 0, **backbone: Any) -> StudentTeacher:
    changed = config.backbone.model_copy(update=backbone)
    config = config.model_copy(update={"seed": seed, "backbone": changed})
    return build_student_teacher(config, device=torch.device("cpu"))


def teacher_of(model: StudentTeacher) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.teacher.named_parameters()}


GIVEN = teacher_of(built(seed=5))
BARE = {
    name.removeprefix("backbone."): tensor
    for name, tensor in GIVEN.items()
    if name.startswith("backbone.")
}


def saved(weights: dict[str, Tensor], path: Path) -> Path:
    save_file(weights, path)
    return path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "w.safetensors"


def test_a_teacher_with_heads_replaces_both(path: Path) -> None:
    model = built()
    report = load_starting_weights(model, path=saved(GIVEN, path))
    assert len(report.loaded) == len(GIVEN)
    for part in (model.student, model.teacher):
        for name, parameter in part.named_parameters():
            assert torch.equal(parameter, GIVEN[name])


def test_a_teacher_with_heads_may_be_warmed_up(path: Path) -> None:
    assert not load_starting_weights(built(WARM), path=saved(GIVEN, path)).missing


def test_a_checkpoint_of_the_reference_gives_its_teacher(tmp_path: Path) -> None:
    path = tmp_path / "model.pth"
    state = {f"teacher.{name}": tensor for name, tensor in GIVEN.items()}
    state |= {f"student.{name}": tensor + 1 for name, tensor in GIVEN.items()}
    torch.save({"model": state, "iteration": 3}, path)
    model = built()
    report = load_starting_weights(model, path=path)
    assert report.unexpected == ("iteration", *(f"student.{name}" for name in GIVEN))
    assert torch.equal(model.student.dino_head.mlp[0].weight, GIVEN["dino_head.mlp.0.weight"])


@pytest.mark.parametrize("form", ["release", "huggingface"])
def test_a_bare_backbone_leaves_the_heads_as_drawn(path: Path, form: str) -> None:
    weights = BARE if form == "release" else to_huggingface(BARE)
    model, fresh = built(WARM), teacher_of(built(WARM))
    report = load_starting_weights(model, path=saved(weights, path))
    assert report.missing == tuple(sorted(name for name in GIVEN if "head." in name))
    for name, parameter in model.teacher.named_parameters():
        source = GIVEN if name.startswith("backbone.") else fresh
        assert torch.equal(parameter, source[name])


@pytest.mark.parametrize("registers", ["", "reg4_"])
@torch.no_grad()
def test_a_network_of_timm_gives_its_own_tokens(path: Path, registers: str) -> None:
    network = timm.create_model(
        f"vit_small_patch14_{registers}dinov2",
        pretrained=False,
        img_size=16,
        patch_size=4,
        embed_dim=16,
        depth=2,
        num_heads=2,
    ).eval()
    model = built(WARM, num_register_tokens=4 if registers else 0)
    report = load_starting_weights(model, path=saved(network.state_dict(), path))
    assert "backbone.mask_token" in report.missing
    assert not model.teacher.backbone.mask_token.any()
    images = torch.randn(2, 3, 16, 16)
    tokens = network.forward_features(images)
    features = model.teacher.backbone.features(images)
    torch.testing.assert_close(features.cls, tokens[:, 0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(features.patches, tokens[:, -16:], atol=1e-5, rtol=1e-5)


def test_heads_are_never_random_in_silence(path: Path) -> None:
    with pytest.raises(
        InputError,
        match=r"holds no dino_head and no ibot_head, .* set head_warmup\.num_steps, .* to more than "
        r"optimization\.freeze_prototypes_steps 1, or give weights with heads",
    ):
        load_starting_weights(built(), path=saved(BARE, path))
    one = {name: tensor for name, tensor in GIVEN.items() if not name.startswith("ibot_head.")}
    with pytest.raises(InputError, match="holds no ibot_head, and heads"):
        load_starting_weights(built(), path=saved(one, path))
    part = {name: tensor for name, tensor in GIVEN.items() if name != "ibot_head.mlp.0.bias"}
    with pytest.raises(InputError, match=r"lacks 1 parameters: ibot_head\.mlp\.0\.bias"):
        load_starting_weights(built(WARM), path=saved(part, path))


@pytest.mark.parametrize(
    ("backbone", "message"),
    [
        (
            {"num_register_tokens": 2},
            r"num_register_tokens is 2 and the spec's 0: set backbone\.num_register_tokens to 2",
        ),
        (
            {"patch_size_pixels": 8},
            r"patch_size_pixels is 8 and the spec's 4: set backbone\.patch_size_pixels to 8",
        ),
        ({"num_channels": 1}, r"set backbone\.num_channels to 1"),
        ({"feed_forward": "swiglu"}, r"set backbone\.feed_forward to swiglu"),
        (
            {"architecture": Dimensions(embed_dim=16, depth=1, num_heads=2)},
            r"depth is 1 .* backbone\.architecture to dimensions with embed_dim 16 and depth 1",
        ),
        (
            {"architecture": Dimensions(embed_dim=16, depth=2, num_heads=2, mlp_ratio=2.0)},
            r"set backbone\.architecture with the mlp_ratio that gives 32",
        ),
        (
            {"architecture": "vit_tiny"},
            r"embed_dim is 192 and the spec's 16, its depth is 12 and the spec's 2: "
            r"set backbone\.architecture to vit_tiny; or give",
        ),
    ],
)
def test_another_architecture_names_the_setting(
    path: Path, backbone: dict[str, Any], message: str
) -> None:
    weights = teacher_of(built(**backbone))
    with pytest.raises(InputError, match=message):
        load_starting_weights(built(), path=saved(weights, path))


def test_other_heads_name_the_setting(path: Path) -> None:
    saved(GIVEN, path)
    wide = Head(num_prototypes=9, bottleneck_dim=4, hidden_dim=8)
    config = CONFIG.model_copy(update={"ibot": IbotObjective(head=wide)})
    with pytest.raises(
        InputError, match=r"ibot_head has 8 prototypes .* set ibot\.head\.num_prototypes to 8"
    ):
        load_starting_weights(built(config), path=path)
    shared = CONFIG.model_copy(update={"ibot": IbotObjective(head=SharedHead())})
    with pytest.raises(InputError, match=r"ibot\.head is shared; set ibot\.head\.kind to own"):
        load_starting_weights(built(shared), path=path)


def test_what_is_not_explained_is_listed(path: Path) -> None:
    extra = GIVEN | {"backbone.adapter": torch.ones(1), "classifier": torch.ones(1)}
    with pytest.raises(
        InputError, match=r"also holds 2 parameters: backbone\.adapter, classifier;"
    ):
        load_starting_weights(built(), path=saved(extra, path))
    less = {name: tensor for name, tensor in BARE.items() if "ls1" not in name}
    with pytest.raises(InputError, match=r"lacks 2 parameters: backbone\.blocks\.0\.ls1\.gamma"):
        load_starting_weights(built(WARM), path=saved(less, path))


def test_positions_of_another_grid_are_resampled(path: Path) -> None:
    large = CONFIG.model_copy(
        update={"crops": Crops(global_crop_size_pixels=24, local_crop_size_pixels=8)}
    )
    model = built(large)
    report = load_starting_weights(model, path=saved(GIVEN, path))
    assert report.resampled == ("backbone.pos_embed",)
    expected = resample_to_side(GIVEN["backbone.pos_embed"], 6)
    assert torch.equal(model.teacher.backbone.pos_embed, expected)
