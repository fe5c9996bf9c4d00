"""Figures of a training: curves, crops as the networks get them, patch tokens over time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from torch import Tensor

from dinov2_core.evaluation.figure_style import (
    INK,
    MUTED,
    PALE,
    PALETTE,
    hide_axes,
    new_figure,
    show_image,
    style_plot,
)

_MASK_COLOUR = (0.72, 0.8, 0.9)
_MASK_OPACITY = 0.8
_MAX_POINTS = 400
Rows = Sequence[tuple[int, Mapping[str, float]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """One small plot."""

    title: str
    """What it shows, with its unit."""
    curves: Mapping[str, str]
    """Metric and how the legend calls it."""
    is_stacked: bool = False
    """Areas that add up instead of lines."""
    is_logarithmic: bool = False
    """Powers of ten on the vertical axis."""
    is_from_zero: bool = False
    """The vertical axis begins at 0."""


def curves_figure(rows: Rows, *, panels: Sequence[Panel], num_columns: int = 3) -> Figure:
    """Draw metrics over steps; a panel without any value says so.

    Args:
        rows: Step and metrics, in the order of the steps; metrics may be absent at some steps.
        panels: What to draw, row by row.
        num_columns: Panels side by side.
    """
    num_rows = -(-len(panels) // num_columns)
    figure = new_figure(width=4.2 * num_columns, height=2.7 * num_rows)
    axes = figure.subplots(num_rows, num_columns, squeeze=False).flatten()
    last = max((step for step, _ in rows), default=0) + 1
    for cell, panel in zip(axes, panels, strict=False):
        _style(cell, panel.title, last=last)
        drawn = {name: series(rows, metric) for metric, name in panel.curves.items()}
        drawn = {name: curve for name, curve in drawn.items() if len(curve)}
        if not drawn:
            cell.set_yticks([])
            cell.text(
                0.5, 0.5, "not measured yet", transform=cell.transAxes, ha="center", color=PALE
            )
        elif panel.is_stacked:
            _stack(cell, drawn)
        else:
            _lines(cell, drawn, is_logarithmic=panel.is_logarithmic)
            if panel.is_from_zero:
                cell.set_ylim(bottom=0)
    for cell in axes[len(panels) :]:
        cell.set_axis_off()
    return figure


def series(rows: Rows, metric: str) -> NDArray[np.float64]:
    """Steps and values of a metric [n, 2], averaged over neighbours down to a few hundred."""
    points = np.array([(step + 1, row[metric]) for step, row in rows if metric in row])
    if len(points) <= _MAX_POINTS:
        return points.reshape(-1, 2)
    return np.array([part.mean(axis=0) for part in np.array_split(points, _MAX_POINTS)])


def crops_figure(
    *,
    global_crops: NDArray[np.uint8],
    masks: NDArray[np.bool_],
    local_crops: NDArray[np.uint8],
    num_images: int,
) -> Figure:
    """Draw the crops of some images, one row each: global ones with and without mask, local ones.

    Args:
        global_crops: [2B, H, W, C], crop 0 of every image first.
        masks: [2B, h, w], true where the student sees no patch.
        local_crops: [L*B, H', W', C], local crop 0 of every image first.
        num_images: B.
    """
    num_local = len(local_crops) // num_images
    columns = 4 + num_local
    figure = new_figure(width=1.25 * columns, height=1.25 * num_images + 0.35)
    axes = figure.subplots(num_images, columns, squeeze=False)
    hide_axes(axes)
    for image in range(num_images):
        for crop in range(2):
            index = crop * num_images + image
            whole = global_crops[index]
            show_image(axes[image, 2 * crop], whole)
            show_image(axes[image, 2 * crop + 1], _masked(whole, masks[index]))
        for crop in range(num_local):
            show_image(axes[image, 4 + crop], local_crops[crop * num_images + image])
    titles = ["global 1", "as masked", "global 2", "as masked"]
    titles += [f"local {crop + 1}" for crop in range(num_local)]
    for cell, title in zip(axes[0], titles, strict=True):
        cell.set_title(title, fontsize=9, color=INK)
    return figure


def aligned_components(
    patches: Tensor, *, grid_height: int, previous: NDArray[np.float32] | None
) -> NDArray[np.float32]:
    """First three principal components of patch tokens, turned to look like earlier ones.

    Components have no sign or order of their own over time; the rotation that brings them closest
    to the earlier ones (orthogonal Procrustes) keeps colours comparable.

    Args:
        patches: Patch tokens [n, N, D] of the same images as before, D >= 3.
        grid_height: Rows h of the patch grid.
        previous: Earlier result for the same images, if there is one.

    Returns:
        [n, h, w, 3], each component of deviation 1 before the rotation.
    """
    num_images = len(patches)
    tokens = patches.double().flatten(0, 1)
    centred = tokens - tokens.mean(dim=0)
    _, _, directions = torch.linalg.svd(centred, full_matrices=False)  # rows, largest first
    components = centred @ directions[:3].T  # [n * N, 3]
    components = components / components.std(dim=0).clamp_min(1e-12)
    if previous is not None:
        earlier = torch.from_numpy(previous).double().reshape(-1, 3)
        left, _, right = torch.linalg.svd(components.T @ earlier)
        components = components @ left @ right
    aligned: NDArray[np.float32] = (
        components.float().reshape(num_images, grid_height, -1, 3).numpy()
    )
    return aligned


def components_figure(
    images: NDArray[np.uint8], *, components: Mapping[int, NDArray[np.float32]]
) -> Figure:
    """Draw fixed images and, to the right, their components at some steps.

    Args:
        images: [n, H, W, C], uint8.
        components: By step, from `aligned_components`, oldest first; at least one.
    """
    columns = 1 + len(components)
    figure = new_figure(width=1.3 * columns, height=1.3 * len(images) + 0.35)
    axes = figure.subplots(len(images), columns, squeeze=False)
    hide_axes(axes)
    axes[0, 0].set_title("image", fontsize=9, color=INK)
    for row, image in zip(axes, images, strict=True):
        show_image(row[0], image)
    for column, (step, maps) in enumerate(components.items(), start=1):
        low, high = np.quantile(maps.reshape(-1, 3), (0.02, 0.98), axis=0)
        colours = np.clip((maps - low) / np.maximum(high - low, 1e-12), 0, 1)
        axes[0, column].set_title(f"step {step:,}", fontsize=9, color=INK)
        for row, shown in zip(axes, colours, strict=True):
            row[column].imshow(shown, interpolation="nearest")
    return figure


def _style(cell: Axes, title: str, *, last: int) -> None:
    style_plot(cell, title, spines=("left", "bottom"))
    cell.set_xlim(0, last)
    cell.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    cell.xaxis.set_major_formatter(
        lambda step, _: f"{step / 1000:g}k" if step >= 1e4 else f"{step:g}"
    )
    cell.tick_params(colors=MUTED, labelsize=8, length=3)
    cell.grid(axis="y", color="#e8ebee", linewidth=0.8)
    cell.set_axisbelow(True)


def _lines(cell: Axes, drawn: Mapping[str, NDArray[np.float64]], *, is_logarithmic: bool) -> None:
    for (name, curve), colour in zip(drawn.items(), cycle(PALETTE), strict=False):
        marker = "o" if len(curve) <= 40 else ""
        cell.plot(*curve.T, color=colour, linewidth=1.5, marker=marker, markersize=2.5, label=name)
    if is_logarithmic:
        cell.set_yscale("log")
    if len(drawn) > 1:
        cell.legend(fontsize=8, frameon=False, labelcolor=INK, handlelength=1.2, ncols=2)


def _stack(cell: Axes, drawn: Mapping[str, NDArray[np.float64]]) -> None:
    steps = next(iter(drawn.values()))[:, 0]
    values = [np.interp(steps, *curve.T) for curve in drawn.values()]
    cell.stackplot(steps, *values, labels=list(drawn), colors=PALETTE, alpha=0.85, linewidth=0)
    cell.set_ylim(0, 1.25 * float(np.quantile(np.sum(values, axis=0), 0.98)))
    handles, labels = cell.get_legend_handles_labels()
    cell.legend(
        handles, labels, fontsize=7.5, frameon=False, labelcolor=INK, handlelength=1, ncols=3
    )


def _masked(image: NDArray[np.uint8], mask: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """Cover the patches [h, w] that are hidden from the student."""
    rows, columns = image.shape[0] // mask.shape[0], image.shape[1] // mask.shape[1]
    hidden = mask.repeat(rows, axis=0).repeat(columns, axis=1)[:, :, None]
    cover = (1 - _MASK_OPACITY) * image + _MASK_OPACITY * 255 * np.array(_MASK_COLOUR)
    shown: NDArray[np.uint8] = np.where(hidden, cover, image).astype(np.uint8)
    return shown
