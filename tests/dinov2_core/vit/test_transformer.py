from typing import Any

import pytest
import timm
import torch
from torch import Tensor

from dinov2_core.vit.transformer import VisionTransformer


def make_transformer(**changes: Any) -> VisionTransformer:
    settings: dict[str, Any] = {
        "image_size_pixels": 16,
        "patch_size_pixels": 4,
        "embed_dim": 32,
        "depth": 2,
        "num_heads": 2,
        "layer_scale": 0.5,
    }
    return VisionTransformer(**(settings | changes))


def randomise(model: VisionTransformer) -> None:
    generator = torch.Generator().manual_seed(0)
    model.init_weights(generator)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)


def images(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("name", "num_register_tokens", "size"),
    [
        ("vit_small_patch14_dinov2", 0, 518),
        ("vit_small_patch14_reg4_dinov2", 4, 518),
        ("vit_small_patch14_reg4_dinov2", 4, 224),
    ],
)
def test_tokens_equal_timms(name: str, num_register_tokens: int, size: int) -> None:
    ours = make_transformer(
        image_size_pixels=518,
        patch_size_pixels=14,
        embed_dim=384,
        depth=3,
        num_heads=6,
        num_register_tokens=num_register_tokens,
        layer_scale=1.0,
    ).eval()
    randomise(ours)
    state = ours.state_dict()
    state.pop("mask_token")
    if num_register_tokens:
        positions = state.pop("pos_embed")
        state["reg_token"] = state.pop("register_tokens")
        state["cls_token"] = state["cls_token"] + positions[:, :1]
        state["pos_embed"] = positions[:, 1:]
    theirs = timm.create_model(name, pretrained=False, depth=3, dynamic_img_size=size != 518).eval()
    theirs.load_state_dict(state)
    crop = images(1, 3, size, size)
    with torch.no_grad():
        features = ours.features(crop)
        expected = theirs.forward_features(crop)
    actual = torch.cat([features.cls[:, None], features.registers, features.patches], dim=1)
    assert (actual - expected).abs().max() == 0.0


@pytest.mark.parametrize("feed_forward", ["mlp", "swiglu"])
@pytest.mark.parametrize("num_register_tokens", [0, 3])
def test_packing_crops_changes_nothing(feed_forward: str, num_register_tokens: int) -> None:
    model = make_transformer(
        feed_forward=feed_forward, num_register_tokens=num_register_tokens, drop_path_rate=0.3
    ).eval()
    randomise(model)
    large, small, oblong = images(2, 3, 16, 16), images(5, 3, 8, 8), images(3, 3, 8, 12)
    mask = torch.rand(2, 16, generator=torch.Generator().manual_seed(2)) < 0.4
    packed = model([large, small, oblong], masks=[mask, None, None])
    apart = [
        *model([large], masks=[mask]),
        model.features(small),
        model.features(oblong),
    ]
    for together, alone in zip(packed, apart, strict=True):
        torch.testing.assert_close(together.cls, alone.cls, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(together.registers, alone.registers, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(together.patches, alone.patches, atol=1e-6, rtol=1e-5)
    assert packed[2].patches.shape == (3, 6, 32)
    assert packed[2].registers.shape == (3, num_register_tokens, 32)


def test_a_masked_patch_is_not_seen() -> None:
    model = make_transformer().eval()
    randomise(model)
    crop = images(1, 3, 16, 16)
    mask = torch.zeros(1, 16, dtype=torch.bool)
    mask[0, 5] = True
    changed = crop.clone()
    changed[:, :, 4:8, 4:8] += 1  # patch 5: second row, second column
    seen, hidden = model([crop], masks=[mask])[0], model([changed], masks=[mask])[0]
    assert torch.equal(seen.patches, hidden.patches)
    assert not torch.equal(model.features(crop).patches, model.features(changed).patches)


def test_dropped_paths_follow_the_seed_and_stop_in_eval_mode() -> None:
    model = make_transformer(drop_path_rate=0.5)
    randomise(model)
    crops = [images(8, 3, 16, 16), images(6, 3, 8, 8)]
    with torch.random.fork_rng():
        outputs = []
        for seed in (0, 0, 1):
            torch.manual_seed(seed)
            outputs.append(model(crops)[1].cls)
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])
    model.eval()
    assert torch.equal(model(crops)[1].cls, model(crops)[1].cls)


def test_every_parameter_is_initialised_after_the_meta_device() -> None:
    with torch.device("meta"):
        model = make_transformer(num_register_tokens=2, feed_forward="swiglu", layer_scale=1e-5)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
    model.init_weights(torch.Generator().manual_seed(0))
    state = model.state_dict()
    assert all(torch.isfinite(value).all() for value in state.values())
    assert state["mask_token"].abs().max() == 0
    assert 0 < state["cls_token"].abs().max() < 1e-5
    assert 0 < state["register_tokens"].abs().max() < 1e-5
    assert torch.all(state["blocks.1.ls2.gamma"] == torch.tensor(1e-5))
    assert state["pos_embed"].std().item() == pytest.approx(0.02, rel=0.1)
    assert state["blocks.0.mlp.w12.weight"].std().item() == pytest.approx(0.02, rel=0.05)
    again = make_transformer(num_register_tokens=2, feed_forward="swiglu", layer_scale=1e-5)
    again.init_weights(torch.Generator().manual_seed(0))
    assert all(torch.equal(again.state_dict()[name], value) for name, value in state.items())


def test_parameter_names_are_the_references() -> None:
    names = set(make_transformer(depth=1, num_register_tokens=4).state_dict())
    block = [f"{part}.{kind}" for part in ("norm1", "norm2") for kind in ("weight", "bias")]
    block += [
        f"{part}.{kind}"
        for part in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
        for kind in ("weight", "bias")
    ]
    tokens = {"cls_token", "pos_embed", "mask_token", "register_tokens"}
    rest = {"patch_embed.proj.weight", "patch_embed.proj.bias", "norm.weight", "norm.bias"}
    scales = {"blocks.0.ls1.gamma", "blocks.0.ls2.gamma"}
    assert names == tokens | rest | scales | {f"blocks.0.{name}" for name in block}
    assert "register_tokens" not in make_transformer(depth=1).state_dict()


@pytest.mark.parametrize(
    ("architecture", "num_parameters"),
    [
        ({"embed_dim": 384, "depth": 12, "num_heads": 6}, 22.06e6),
        ({"embed_dim": 1536, "depth": 40, "num_heads": 24, "feed_forward": "swiglu"}, 1136.48e6),
    ],
)
def test_sizes_are_the_papers(architecture: dict[str, Any], num_parameters: float) -> None:
    with torch.device("meta"):
        model = make_transformer(image_size_pixels=518, patch_size_pixels=14, **architecture)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(num_parameters, rel=1e-3)


def test_a_mask_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"mask of shape \(1, 9\) does not fit 1 images of 16"):
        make_transformer()([images(1, 3, 16, 16)], masks=[torch.zeros(1, 9, dtype=torch.bool)])


def test_positions_must_be_whole_patches() -> None:
    with pytest.raises(ValueError, match="image_size_pixels 17 is not divisible"):
        make_transformer(image_size_pixels=17)
