"""What all figures share."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from dinov2_core.evaluation.figure_style import hide_axes, new_figure, png_bytes, show_image


def test_figures_have_the_size_that_was_asked_for() -> None:
    image = Image.open(io.BytesIO(png_bytes(new_figure(width=3, height=2), dots_per_inch=50)))
    assert image.size == (150, 100)


def test_gray_images_are_drawn_as_gray() -> None:
    axes = new_figure(width=2, height=1).subplots(1, 2, squeeze=False)
    gray = np.arange(16, dtype=np.uint8).reshape(4, 4, 1)
    show_image(axes[0, 0], gray)
    show_image(axes[0, 1], np.repeat(gray, 3, axis=2))
    drawn = [cell.get_images()[0].get_array() for cell in axes[0]]
    np.testing.assert_array_equal(*drawn)
    hide_axes(axes)
    assert not any(cell.axison for cell in axes[0])
