"""loading: every key of weights and of a module is accounted for."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn

from dinov2_core.errors import InputError
from dinov2_core.weights.loading import LoadReport, load_weights, resample_to_side


class Tokens(nn.Module):
    """A layer and learned positions of a 3 x 3 grid."""

    def __init__(self, *, num_positions: int = 10) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.pos_embed = nn.Parameter(torch.randn(1, num_positions, 4))


def load(
    module: nn.Module, weights: Mapping[str, Tensor], allowed_missing: tuple[str, ...] = ()
) -> LoadReport:
    return load_weights(
        module,
        weights,
        source="the file",
        resamples_positions=True,
        allowed_missing=allowed_missing,
    )


def test_weights_of_an_equal_module_are_copied() -> None:
    module, other = Tokens().to(torch.bfloat16), Tokens()
    report = load(other, module.state_dict())
    assert report.loaded == ("layer.bias", "layer.weight", "pos_embed")
    assert report.resampled == report.missing == report.unexpected == ()
    for one, same in zip(module.parameters(), other.parameters(), strict=True):
        assert torch.equal(one.float(), same)


def test_positions_of_another_grid_are_resampled() -> None:
    larger, smaller = Tokens(num_positions=26), Tokens()
    assert load(larger, smaller.state_dict()).resampled == ("pos_embed",)
    assert torch.equal(larger.pos_embed, resample_to_side(smaller.pos_embed, 5))
    with pytest.raises(InputError, match=r"pos_embed has shape \[1, 10, 4\] in the file"):
        load_weights(larger, smaller.state_dict(), source="the file")


def test_resampling_keeps_a_ramp_and_the_cls_position() -> None:
    ramp = torch.arange(4.0)[:, None].expand(4, 4).reshape(1, 16, 1)
    positions = torch.cat([torch.tensor([[[9.0]]]), ramp], dim=1)
    resampled = resample_to_side(positions, 8)
    assert resampled.shape == (1, 65, 1)
    assert resampled[0, 0, 0] == 9
    rows = resampled[0, 1:, 0].view(8, 8)
    assert torch.allclose(rows, rows[:, :1].expand(8, 8), atol=1e-6)
    assert (rows[1:, 0] > rows[:-1, 0]).all()
    assert rows.mean() == pytest.approx(1.5, abs=1e-5)


def test_positions_of_no_square_grid_are_refused() -> None:
    for count in (12, 0):
        with pytest.raises(InputError, match=rf"pos_embed has shape \[1, {count}, 4\] in the file"):
            load(Tokens(), Tokens().state_dict() | {"pos_embed": torch.zeros(1, count, 4)})


def test_differences_must_be_allowed_by_name() -> None:
    module = Tokens()
    weights = {"layer.weight": torch.zeros(2, 2), "old.scale": torch.zeros(1)}
    with pytest.raises(InputError, match=r"lacks 2 parameters: layer\.bias, pos_embed"):
        load(module, weights)
    with pytest.raises(InputError, match=r"lacks 1 parameters: pos_embed"):
        load(module, weights, allowed_missing=("layer.",))
    with pytest.raises(InputError, match=r"also holds 1 parameters: old\.scale"):
        load(module, weights, allowed_missing=("layer.", "pos_embed"))
    del weights["old.scale"]
    report = load(module, weights, allowed_missing=("layer.", "pos_embed"))
    assert report == LoadReport(
        loaded=("layer.weight",),
        resampled=(),
        missing=("layer.bias", "pos_embed"),
        unexpected=(),
    )
    assert report.summary == "1 loaded, 0 resampled, 2 missing, 0 unexpected"
    assert "missing (kept their first values): 2\n  layer.bias\n  pos_embed\n" in report.text()


def test_what_does_not_fit_is_refused_and_changes_nothing() -> None:
    weights = Tokens().state_dict()
    module = Tokens()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    with pytest.raises(InputError, match=r"layer\.weight has shape \[3\] in .* but \[2, 2\]"):
        load(module, weights | {"layer.weight": torch.zeros(3)})
    with pytest.raises(InputError, match=r"pos_embed in the file holds values that are not finite"):
        load(module, weights | {"pos_embed": torch.full((1, 10, 4), torch.nan)})
    assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())
