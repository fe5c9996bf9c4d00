"""How figures look: colours, margins, images without axes."""

from __future__ import annotations

import io
from collections.abc import Iterable

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from numpy.typing import NDArray

INK, MUTED, PALE = "#22262b", "#5b636d", "#b8bec6"
BLUE, ORANGE = "#0072b2", "#d55e00"
PALETTE = (BLUE, ORANGE, "#009e73", "#cc79a7", "#e69f00", "#56b4e9", INK)


def new_figure(*, width: float, height: float) -> Figure:
    """A figure of a size in inches whose parts do not overlap."""
    layout = ConstrainedLayoutEngine(w_pad=0.07, h_pad=0.07)  # inches
    figure = Figure(figsize=(width, height), layout=layout)
    FigureCanvasAgg(figure)
    return figure


def png_bytes(figure: Figure, *, dots_per_inch: int = 144) -> bytes:
    """A figure as the bytes of a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dots_per_inch, facecolor="white")
    return buffer.getvalue()


def hide_axes(axes: NDArray[np.object_]) -> None:
    """Leave only what is drawn."""
    for cell in axes.flatten():
        cell.set_axis_off()


def show_image(cell: Axes, image: NDArray[np.uint8]) -> None:
    """Draw an image [H, W, C], gray or RGB."""
    rgb = np.repeat(image, 3, axis=2) if image.shape[2] == 1 else image
    cell.imshow(rgb, interpolation="nearest")


def style_plot(cell: Axes, title: str, *, spines: Iterable[str]) -> None:
    """Give a plot its title and only these of its four lines."""
    cell.set_title(title, loc="left", fontsize=10, color=INK, pad=8)
    for side, spine in cell.spines.items():
        spine.set(color=PALE, visible=side in spines)
