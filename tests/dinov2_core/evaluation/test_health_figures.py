"""health_pictures: what is drawn is what was given, and colours stay comparable over time."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dinov2_core.evaluation.health_figures import (
    Panel,
    aligned_components,
    components_figure,
    crops_figure,
    curves_figure,
    series,
)


def test_a_series_keeps_few_points_and_averages_many() -> None:
    rows = [(step, {"a": float(step)} if step % 2 else {}) for step in range(6)]
    np.testing.assert_array_equal(series(rows, "a"), [[2, 1], [4, 3], [6, 5]])
    assert series(rows, "b").shape == (0, 2)
    many = series([(step, {"a": 1.0}) for step in range(5000)], "a")
    assert many.shape == (400, 2)
    assert many[:, 1] == pytest.approx(1.0)
    assert many[:, 0].mean() == pytest.approx(2500.5, abs=100)


def test_every_panel_is_drawn_and_an_empty_one_says_so() -> None:
    rows = [(step, {"a": 1.0 + step, "b": 2.0}) for step in range(12_000)]
    panels = (
        Panel(title="lines", curves={"a": "first", "b": "second"}, is_logarithmic=True),
        Panel(title="areas", curves={"a": "first", "b": "second"}, is_stacked=True),
        Panel(title="from zero", curves={"b": "b"}, is_from_zero=True),
        Panel(title="nothing", curves={"c": "c"}),
    )
    axes = curves_figure(rows, panels=panels).axes
    assert [cell.get_title(loc="left") for cell in axes[:4]] == [p.title for p in panels]
    assert axes[0].get_yscale() == "log"
    assert len(axes[1].collections) == 2
    assert axes[2].get_ylim()[0] == 0
    assert axes[3].texts[0].get_text() == "not measured yet"
    assert axes[0].xaxis.get_major_formatter()(12_000, 0) == "12k"
    assert axes[0].xaxis.get_major_formatter()(500, 0) == "500"


@pytest.mark.parametrize("num_channels", [1, 3])
def test_masked_patches_are_covered(num_channels: int) -> None:
    crops = np.zeros((4, 8, 8, num_channels), dtype=np.uint8)
    masks = np.zeros((4, 2, 2), dtype=np.bool_)
    masks[2, 0, 1] = True  # second global crop of the first image
    local = np.zeros((6, 4, 4, num_channels), dtype=np.uint8)
    figure = crops_figure(global_crops=crops, masks=masks, local_crops=local, num_images=2)
    shown = np.array(figure.axes[3].images[0].get_array())
    assert shown[:4, 4:].min() > 100
    assert shown[4:].max() == 0
    assert [cell.get_title() for cell in figure.axes[:7]][-1] == "local 3"


def test_components_are_turned_to_look_like_earlier_ones() -> None:
    torch.manual_seed(0)
    patches = torch.randn(3, 8, 6) * torch.tensor([5.0, 4.0, 3.0, 0.1, 0.1, 0.1])
    first = aligned_components(patches, grid_height=2, previous=None)
    assert first.shape == (3, 2, 4, 3)
    rotation, _ = torch.linalg.qr(torch.randn(6, 6))
    again = aligned_components(patches @ rotation, grid_height=2, previous=first)
    np.testing.assert_allclose(again, first, atol=0.05)
    images = np.zeros((3, 8, 8, 1), dtype=np.uint8)
    figure = components_figure(images, components={10: first, 2000: again})
    assert [cell.get_title() for cell in figure.axes[:3]] == ["image", "step 10", "step 2,000"]
