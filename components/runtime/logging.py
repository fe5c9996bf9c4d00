"""Log lines of a stage: set up once per process, at its entry point."""

from __future__ import annotations

import logging
import os
import sys
import warnings

QUIET = (
    "alembic",
    "mlflow",
    "matplotlib",
    "urllib3",
    "botocore",
    "git",
    "PIL",
    "fontTools",
    "timm",
)


def set_up_logging() -> None:
    """Plain lines on standard error; own messages from INFO, libraries' from ERROR."""
    rank = os.environ.get("RANK", "")
    prefix = f"[rank {rank}] " if rank not in ("", "0") else ""
    logging.basicConfig(
        level=logging.WARNING, format=f"{prefix}%(message)s", stream=sys.stderr, force=True
    )
    for ours in ("components", "dinov2_core", "pipelines", "k8s"):
        logging.getLogger(ours).setLevel(logging.INFO)
    for library in QUIET:
        logging.getLogger(library).setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    os.environ.setdefault("PYTHONWARNINGS", "ignore")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
