"""Writes a registered teacher in the form that another program loads."""

from __future__ import annotations

import tempfile
from pathlib import Path

from components.runtime.registry import download_teacher
from components.runtime.retry import QUICK, retrying_with
from dinov2_core.config.backbone import TeacherConfig
from dinov2_core.weights.export import Format, write_export
from dinov2_core.weights.reading import read_state_dict
from pipelines.model.embed import chosen_tracking_uri


def export_teacher(model_uri: str, *, target: Format, directory: Path, tracking_uri: str) -> str:
    """Write a registered teacher for timm or Hugging Face and check what was written.

    Args:
        model_uri: Such as `models:/NAME@champion`.
        target: Program that shall load it.
        directory: Gets weights and configuration.
        tracking_uri: Store or server; empty as for `chosen_tracking_uri`.

    Returns:
        What was checked, in a sentence.

    Raises:
        UserError: There is no such model or store.
        TransientError: The store does not answer.
    """
    with tempfile.TemporaryDirectory() as scratch:
        with retrying_with(QUICK):
            files = download_teacher(
                model_uri,
                tracking_uri=chosen_tracking_uri(tracking_uri),
                directory=Path(scratch),
            )
        teacher = TeacherConfig.of_registered(
            files.config.read_bytes(), source=f"the configuration of {model_uri}"
        )
        return write_export(
            teacher, read_state_dict(files.weights).tensors, target=target, directory=directory
        )
