"""Writes a registered teacher in the form that another program loads."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from safetensors.torch import load_file

from components.runtime.registry import fetch_teacher
from components.runtime.retry import QUICK, retrying_with
from dinov2_core.config.backbone import Backbone, Dimensions
from dinov2_core.release import Format, Released, write_release
from pipelines.model.embed import chosen_tracking_uri


def export_teacher(model_uri: str, *, target: Format, directory: Path, tracking_uri: str) -> str:
    """Write a registered teacher for timm or Hugging Face and check what was written.

    Args:
        model_uri: Such as `models:/NAME@champion`.
        target: Program that shall load it.
        directory: Gets weights and configuration.
        tracking_uri: Store or server; empty as for `embed_images`.

    Returns:
        What was checked, in a sentence.

    Raises:
        UserError: There is no such model.
        TrackingUnavailable: There is no tracking server.
        ValueError: The copy differs.
    """
    with tempfile.TemporaryDirectory() as scratch:
        with retrying_with(QUICK):
            files = fetch_teacher(
                model_uri,
                tracking_uri=chosen_tracking_uri(tracking_uri),
                directory=Path(scratch),
            )
        released = _released(files.weights, config=files.config)
        return write_release(released, target=target, directory=directory)


def _released(weights: Path, *, config: Path) -> Released:
    """A teacher from the two files that were registered."""
    described = json.loads(config.read_text(encoding="utf-8"))
    architecture, preprocessing = described["architecture"], described["preprocessing"]
    size = architecture.pop("image_size_pixels")
    dimensions = {name: architecture.pop(name) for name in Dimensions.model_fields}
    backbone = Backbone.model_validate_json(
        json.dumps({"architecture": dimensions, **architecture})
    )
    return Released(
        backbone=backbone,
        weights=load_file(weights),
        image_size_pixels=size,
        mean=tuple(preprocessing["mean"]),
        standard_deviation=tuple(preprocessing["standard_deviation"]),
    )
