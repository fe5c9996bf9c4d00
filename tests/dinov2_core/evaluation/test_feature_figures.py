"""Pictures of features: their numbers, and that they are drawn."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from PIL import Image
from sklearn.decomposition import PCA

from dinov2_core.evaluation.feature_figures import (
    Accuracy,
    Retrieval,
    accuracy_figure,
    patch_component_maps,
    patch_components_figure,
    principal_components,
    retrieval_figure,
    scatter_figure,
)
from dinov2_core.evaluation.figure_style import png_bytes


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def pixels(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


def drawn(figure: Figure) -> Image.Image:
    return Image.open(io.BytesIO(png_bytes(figure, dots_per_inch=50)))


def test_components_equal_scikit_learn_up_to_sign() -> None:
    rows = normal(50, 10) * torch.linspace(1, 3, 10)
    found = principal_components(rows, num_components=3).numpy()
    expected = PCA(3, svd_solver="full").fit_transform(rows.double().numpy())
    np.testing.assert_allclose(np.abs(found), np.abs(expected), atol=1e-8)
    np.testing.assert_allclose(principal_components(rows, num_components=3).numpy(), found)


def test_maps_keep_the_place_of_every_patch() -> None:
    patches = 0.01 * normal(2, 12, 8)
    patches[1, 5] += 100.0
    maps = patch_component_maps(patches, grid_height=3)
    assert maps.shape == (2, 3, 4, 3)
    assert maps.min() >= 0
    assert maps.max() <= 1
    assert maps[1, 1, 1, 0] == 1


def test_maps_need_a_whole_grid_and_three_dimensions() -> None:
    with pytest.raises(ValueError, match="do not fit 5 rows"):
        patch_component_maps(normal(2, 12, 8), grid_height=5)
    with pytest.raises(ValueError, match="three components"):
        patch_component_maps(normal(2, 12, 2), grid_height=3)


@pytest.mark.parametrize("num_channels", [1, 3])
def test_images_stand_beside_their_maps(num_channels: int) -> None:
    figure = patch_components_figure(
        pixels(5, 8, 8, num_channels), patches=normal(5, 4, 6), grid_height=2, num_columns=3
    )
    pictures = [axes.get_images()[0] for axes in figure.axes if axes.get_images()]
    assert len(pictures) == 10
    assert drawn(figure).width == 375


def test_neighbours_are_framed_by_class() -> None:
    figure = retrieval_figure(
        [
            Retrieval(
                query=pixels(8, 8, 3),
                query_class="cat",
                neighbours=pixels(2, 8, 8, 3),
                neighbour_classes=("cat", "a very long class name"),
            ),
            Retrieval(
                query=pixels(8, 8, 3),
                query_class="dog",
                neighbours=pixels(1, 8, 8, 3),
                neighbour_classes=("dog",),
            ),
        ]
    )
    frames = [axes for axes in figure.axes if axes.get_xlabel()]
    assert [axes.get_xlabel() for axes in frames] == [
        *("cat", "cat", "a very long c…"),
        *("dog", "dog"),
    ]
    colours = [axes.spines["left"].get_edgecolor() for axes in frames]
    assert colours[1] == colours[4] != colours[2]
    assert drawn(figure).height > 100


def test_bars_are_as_long_as_the_accuracies() -> None:
    figure = accuracy_figure(
        [
            Accuracy(subject="teacher", measure="kNN", top1=0.8),
            Accuracy(subject="raw pixels", measure="kNN", top1=0.5),
            Accuracy(subject="teacher", measure="logistic", top1=0.9),
        ]
    )
    bars = [[bar.get_width() for bar in axes.patches] for axes in figure.axes]
    assert bars == [[0.8, 0.5], [0.9]]
    assert figure.axes[0].patches[0].get_facecolor() != figure.axes[0].patches[1].get_facecolor()
    assert [text.get_text() for text in figure.axes[0].texts] == ["80.0 %", "50.0 %"]
    assert drawn(figure).width > 100


def test_every_class_has_its_colour() -> None:
    labels = np.arange(60) % 3
    figure = scatter_figure(normal(60, 8), labels=labels, classes=["a", "b", "c"])
    clouds = figure.axes[0].collections
    assert [len(cloud.get_offsets()) for cloud in clouds] == [20, 20, 20]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "b", "c"]
    assert drawn(figure).width == 360


def test_beyond_twenty_classes_the_rare_ones_are_grey() -> None:
    labels = np.concatenate([np.arange(25), np.arange(5, 25)])
    classes = [f"class {index}" for index in range(25)]
    figure = scatter_figure(normal(45, 8), labels=labels, classes=classes)
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names == ["5 other classes", *classes[5:]]
    grey = figure.axes[0].collections[0].get_facecolor()[0]
    np.testing.assert_allclose(grey, to_rgba("#b8bec6"))
