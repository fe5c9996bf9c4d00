"""loading: every key of weights and of a module is accounted for."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn

from dinov2_core.weights.loading import LoadReport, load_weights


class Tokens(nn.Module):
    """A layer and learned positions of a 3 x 3 grid."""

    def __init__(self, *, num_positions: int = 10) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.pos_embed = nn.Parameter(torch.randn(1, num_positions, 4))


def flat(positions: Tensor, side: int) -> Tensor:
    """A resampling whose result is easy to know."""
    return positions.new_full((1, 1 + side * side, positions.shape[2]), float(side))


def load(
    module: nn.Module, weights: Mapping[str, Tensor], **allowed: tuple[str, ...]
) -> LoadReport:
    return load_weights(module, weights, source="the file", resample=flat, **allowed)


def test_weights_of_an_equal_module_are_taken_over() -> None:
    module, other = Tokens().to(torch.bfloat16), Tokens()
    report = load(other, module.state_dict())
    assert report.loaded == ("layer.bias", "layer.weight", "pos_embed")
    assert report.resampled == report.missing == report.unexpected == ()
    for one, same in zip(module.parameters(), other.parameters(), strict=True):
        assert torch.equal(one.float(), same)


def test_positions_of_another_grid_are_resampled() -> None:
    larger = Tokens(num_positions=26)
    assert load(larger, Tokens().state_dict()).resampled == ("pos_embed",)
    assert larger.pos_embed.eq(5).all()


def test_positions_of_no_square_grid_are_refused() -> None:
    with pytest.raises(ValueError, match=r"pos_embed has shape \[1, 12, 4\] in the file"):
        load(Tokens(), Tokens(num_positions=12).state_dict())


def test_differences_must_be_allowed_by_name() -> None:
    module = Tokens()
    weights = {"layer.weight": torch.zeros(2, 2), "old.scale": torch.zeros(1)}
    with pytest.raises(ValueError, match=r"lacks 2 parameters: layer\.bias, pos_embed"):
        load(module, weights)
    with pytest.raises(ValueError, match=r"lacks 1 parameters: pos_embed"):
        load(module, weights, allowed_missing=("layer.",))
    with pytest.raises(ValueError, match=r"also holds 1 parameters: old\.scale"):
        load(module, weights, allowed_missing=("layer.", "pos_embed"))
    report = load(
        module, weights, allowed_missing=("layer.", "pos_embed"), allowed_unexpected=("old.",)
    )
    assert report == LoadReport(
        loaded=("layer.weight",),
        resampled=(),
        missing=("layer.bias", "pos_embed"),
        unexpected=("old.scale",),
    )
    assert report.summary == "1 loaded, 0 resampled, 2 missing, 1 unexpected"
    assert "missing (kept their first values): 2\n  layer.bias\n  pos_embed\n" in report.text()


def test_what_does_not_fit_is_refused_and_changes_nothing() -> None:
    weights = Tokens().state_dict()
    module = Tokens()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    with pytest.raises(ValueError, match=r"layer\.weight has shape \[3\] in .* but \[2, 2\]"):
        load(module, weights | {"layer.weight": torch.zeros(3)})
    with pytest.raises(ValueError, match=r"pos_embed in the file holds values that are not finite"):
        load(module, weights | {"pos_embed": torch.full((1, 10, 4), torch.nan)})
    assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())
