"""export: every key of a file and of a module is accounted for."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dinov2_core.distributed.export import LoadReport, export_weights, load_teacher_weights


class Tokens(nn.Module):
    """A layer and learned positions of a 3 x 3 grid."""

    def __init__(self, *, num_positions: int = 10) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.pos_embed = nn.Parameter(torch.randn(1, num_positions, 4))


def flat(positions: Tensor, side: int) -> Tensor:
    """A resampling whose result is easy to know."""
    return positions.new_full((1, 1 + side * side, positions.shape[2]), float(side))


def load(module: nn.Module, path: Path, **allowed: tuple[str, ...]) -> LoadReport:
    return load_teacher_weights(module, path=path, resample=flat, **allowed)


def test_an_exported_file_loads_into_an_equal_module(tmp_path: Path) -> None:
    path, module, other = tmp_path / "deep" / "weights.safetensors", Tokens(), Tokens()
    sha256 = export_weights(module.to(torch.float64), path=path)
    assert sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert all(weight.dtype == torch.float32 for weight in load_file(path).values())
    report = load(other, path)
    assert report.loaded == ("layer.bias", "layer.weight", "pos_embed")
    assert report.resampled == report.missing == report.unexpected == ()
    for one, same in zip(module.parameters(), other.parameters(), strict=True):
        assert torch.equal(one.float(), same)
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_positions_of_another_grid_are_resampled(tmp_path: Path) -> None:
    path, larger = tmp_path / "weights.safetensors", Tokens(num_positions=26)
    export_weights(Tokens(), path=path)
    report = load(larger, path)
    assert report.resampled == ("pos_embed",)
    assert larger.pos_embed.eq(5).all()


def test_differences_must_be_allowed_by_name(tmp_path: Path) -> None:
    path, module = tmp_path / "weights.safetensors", Tokens()
    save_file({"layer.weight": torch.zeros(2, 2), "old.scale": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=r"lacks 2 parameters: layer\.bias, pos_embed"):
        load(module, path)
    with pytest.raises(ValueError, match=r"lacks 1 parameters: pos_embed"):
        load(module, path, allowed_missing=("layer.",))
    with pytest.raises(ValueError, match=r"also holds 1 parameters: old\.scale"):
        load(module, path, allowed_missing=("layer.", "pos_embed"))
    report = load(
        module, path, allowed_missing=("layer.", "pos_embed"), allowed_unexpected=("old.",)
    )
    assert report == LoadReport(
        loaded=("layer.weight",),
        resampled=(),
        missing=("layer.bias", "pos_embed"),
        unexpected=("old.scale",),
    )


def test_another_shape_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    export_weights(Tokens(), path=path)
    weights = load_file(path)
    save_file(weights | {"layer.bias": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match=r"layer\.bias has shape \[3\] in .* but \[2\]"):
        load(Tokens(), path)
