"""Figures of frozen features: patch components, nearest neighbours, accuracies, a scatter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from dinov2_core.evaluation.figure_style import (
    BLUE,
    INK,
    MUTED,
    ORANGE,
    PALE,
    hide_axes,
    new_figure,
    show_image,
    style_plot,
)

_MAX_SCATTER_CLASSES = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Accuracy:
    """One bar: how often one kind of classifier is right on one kind of features."""

    subject: str
    """Whose features: the teacher or a baseline."""
    measure: str
    """Which classifier, such as 20 nearest neighbours."""
    top1: float
    """Share classified correctly, in [0, 1]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Retrieval:
    """A query image and its nearest neighbours, nearest first."""

    query: NDArray[np.uint8]
    """[H, W, C]."""
    query_class: str
    """Its class name."""
    neighbours: NDArray[np.uint8]
    """[k, H, W, C]."""
    neighbour_classes: tuple[str, ...]
    """Their k class names."""


def principal_components(features: Tensor, *, num_components: int) -> Tensor:
    """Project features [N, D] on their first principal components [N, P], largest first.

    Each component's sign is such that its largest loading is positive, so that the same features
    give the same picture.
    """
    centred = features.double() - features.double().mean(dim=0)
    covariance = centred.T @ centred / len(centred)  # [D, D]
    _, vectors = torch.linalg.eigh(covariance)  # ascending
    directions = vectors[:, -num_components:].flip(1)  # [D, P]
    largest = directions.gather(0, directions.abs().argmax(dim=0, keepdim=True))
    components: Tensor = centred @ (directions * largest.sign())
    return components


def patch_component_maps(patches: Tensor, *, grid_height: int) -> NDArray[np.float32]:
    """Show patch tokens by their first three principal components over all given images.

    Each component is stretched from its 2nd to its 98th percentile to one colour channel, as
    arXiv:2304.07193 pictures them.

    Args:
        patches: Patch tokens [B, N, D], row by row; D >= 3.
        grid_height: Rows h of the patch grid; divides N.

    Returns:
        Colours [B, h, w, 3] in [0, 1].
    """
    num_images, num_patches, embed_dim = patches.shape
    if num_patches % grid_height or embed_dim < 3:
        raise ValueError(
            f"patches of shape {tuple(patches.shape)} do not fit {grid_height} rows and three "
            "components; give [B, h * w, D] with D >= 3 and grid_height h"
        )
    components = principal_components(patches.cpu().flatten(0, 1), num_components=3)
    limits = torch.tensor([0.02, 0.98], dtype=components.dtype)
    low, high = components.quantile(limits, dim=0)
    colours = ((components - low) / (high - low).clamp_min(1e-12)).clamp(0, 1)
    maps: NDArray[np.float32] = colours.float().reshape(num_images, grid_height, -1, 3).numpy()
    return maps


def patch_components_figure(
    images: NDArray[np.uint8], *, patches: Tensor, grid_height: int, num_columns: int = 4
) -> Figure:
    """Draw each image beside the map of its patch tokens' first three principal components.

    Args:
        images: What the backbone saw [B, H, W, C], uint8.
        patches: Its patch tokens [B, N, D].
        grid_height: Rows of the patch grid.
        num_columns: Pairs side by side.
    """
    maps = patch_component_maps(patches, grid_height=grid_height)
    num_columns = min(num_columns, len(images))
    num_rows = ceil(len(images) / num_columns)
    figure = new_figure(width=2.5 * num_columns, height=1.22 * num_rows + 0.62)
    axes = figure.subplots(
        num_rows, 3 * num_columns - 1, squeeze=False, width_ratios=_pairs(num_columns)
    )
    hide_axes(axes)
    for index, (image, colours) in enumerate(zip(images, maps, strict=True)):
        row, column = divmod(index, num_columns)
        show_image(axes[row, 3 * column], image)
        axes[row, 3 * column + 1].imshow(colours, interpolation="nearest")
    _headline(
        figure,
        "Patch tokens by their first three principal components",
        "like colours, like features; one projection over all images",
    )
    return figure


def retrieval_figure(retrievals: Sequence[Retrieval]) -> Figure:
    """Draw each query, then its nearest neighbours framed by whether the class is the same."""
    num_neighbours = max(len(retrieval.neighbours) for retrieval in retrievals)
    figure = new_figure(
        width=1.12 * (num_neighbours + 1) + 0.5, height=1.3 * len(retrievals) + 0.75
    )
    axes = figure.subplots(
        len(retrievals),
        num_neighbours + 2,
        squeeze=False,
        width_ratios=[1, 0.18, *[1] * num_neighbours],
    )
    hide_axes(axes)
    for row, retrieval in zip(axes, retrievals, strict=True):
        _framed(row[0], retrieval.query, name=retrieval.query_class, colour=INK)
        found = zip(retrieval.neighbours, retrieval.neighbour_classes, strict=True)
        for cell, (image, name) in zip(row[2:], found, strict=False):
            colour = BLUE if name == retrieval.query_class else ORANGE
            _framed(cell, image, name=name, colour=colour)
    _headline(
        figure,
        "Nearest neighbours of test images among the labelled images",
        "query left, nearest first; blue: same class, orange: another class",
    )
    return figure


def accuracy_figure(accuracies: Sequence[Accuracy]) -> Figure:
    """Draw one panel of bars per measure; the first subject stands out against the others."""
    subjects = list(dict.fromkeys(accuracy.subject for accuracy in accuracies))
    measures = list(dict.fromkeys(accuracy.measure for accuracy in accuracies))
    figure = new_figure(width=1.6 + 3.1 * len(measures), height=1.25 + 0.42 * len(subjects))
    axes = figure.subplots(1, len(measures), squeeze=False, sharey=True)[0]
    for cell, measure in zip(axes, measures, strict=True):
        bars = [accuracy for accuracy in accuracies if accuracy.measure == measure]
        heights = [subjects.index(bar.subject) for bar in bars]
        colours = [PALE if height else BLUE for height in heights]
        cell.barh(heights, [bar.top1 for bar in bars], height=0.68, color=colours)
        for height, bar in zip(heights, bars, strict=True):
            cell.text(bar.top1 + 0.015, height, f"{100 * bar.top1:.1f} %", va="center", fontsize=9)
        style_plot(cell, measure, spines=("left",))
        cell.set_xlim(0, 1.18)
        cell.set_xticks([])
        cell.tick_params(axis="y", length=0)
    axes[0].set_yticks(range(len(subjects)), subjects)
    axes[0].invert_yaxis()
    _headline(figure, "Accuracy on frozen features", "share of test images classified correctly")
    return figure


def scatter_figure(
    features: Tensor, *, labels: NDArray[np.int64], classes: Sequence[str]
) -> Figure:
    """Draw features [N, D] on their first two principal components, coloured by class [N].

    Beyond twenty classes the twenty most frequent are coloured and the others are grey.
    """
    components = principal_components(features.cpu(), num_components=2)
    total = (features.cpu().double() - features.cpu().double().mean(dim=0)).square().sum()
    shares = (components.square().sum(dim=0) / total).tolist()
    points = components.numpy()
    figure = new_figure(width=7.2, height=5.2)
    axes = figure.subplots()
    counts = np.bincount(labels, minlength=len(classes))
    shown = sorted(np.argsort(-counts, kind="stable")[:_MAX_SCATTER_CLASSES].tolist())
    is_other = ~np.isin(labels, shown)
    if is_other.any():
        name = f"{len(classes) - len(shown)} other classes"
        axes.scatter(
            points[is_other, 0], points[is_other, 1], s=9, color=PALE, linewidths=0, label=name
        )
    palette = mpl.colormaps["tab10" if len(shown) <= 10 else "tab20"]
    for number, label in enumerate(shown):
        chosen = points[labels == label]
        axes.scatter(
            chosen[:, 0],
            chosen[:, 1],
            s=11,
            color=palette(number),
            alpha=0.75,
            linewidths=0,
            label=classes[label],
        )
    axes.set_xlabel(f"first component, {100 * shares[0]:.0f} % of the variance")
    axes.set_ylabel(f"second component, {100 * shares[1]:.0f} %")
    axes.set_xticks([])
    axes.set_yticks([])
    style_plot(axes, "", spines=("left", "bottom"))
    legend = figure.legend(loc="outside right center", frameon=False, fontsize=9, markerscale=2.2)
    for handle in filter(None, legend.legend_handles):
        handle.set_alpha(1)
    _headline(figure, "Cls tokens of test images", "first two principal components, by class")
    return figure


def _headline(figure: Figure, title: str, explanation: str) -> None:
    figure.suptitle(
        f"{title}\n", x=_margin(figure), ha="left", fontsize=12, fontweight="bold", color=INK
    )
    figure.text(
        _margin(figure),
        1 - 0.36 / figure.get_figheight(),
        explanation,
        va="top",
        fontsize=9,
        color=MUTED,
    )


def _margin(figure: Figure) -> float:
    """A tenth of an inch, as a share of the figure's width."""
    return 0.1 / figure.get_figwidth()


def _pairs(num_columns: int) -> list[float]:
    """Relative widths of image, map and gap, repeated."""
    return [1.0, 1.0, 0.15] * (num_columns - 1) + [1.0, 1.0]


def _framed(axes: Axes, image: NDArray[np.uint8], *, name: str, colour: str) -> None:
    show_image(axes, image)
    axes.set_axis_on()
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set(color=colour, linewidth=2.2)
    shown = name if len(name) <= 14 else f"{name[:13]}…"
    axes.set_xlabel(shown, fontsize=8, color=colour, labelpad=2)
