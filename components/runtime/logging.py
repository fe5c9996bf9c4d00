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

MLFLOW_QUIET = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_LOGGING_LEVEL": "ERROR",
}
"""Set before MLflow is imported, it neither reports home nor draws bars into a log."""


def set_up_logging() -> None:
    """Plain lines on standard error: own messages from INFO, libraries' from WARNING or ERROR.

    Ranks other than 0 leave progress and other information to rank 0; their warnings and errors
    begin with the rank.
    """
    rank = os.environ.get("RANK", "")
    is_other_rank = rank not in ("", "0")
    prefix = f"[rank {rank}] " if is_other_rank else ""
    logging.basicConfig(
        level=logging.WARNING, format=f"{prefix}%(message)s", stream=sys.stderr, force=True
    )
    for ours in ("components", "dinov2_core", "pipelines", "k8s"):
        logging.getLogger(ours).setLevel(logging.WARNING if is_other_rank else logging.INFO)
    for library in QUIET:
        logging.getLogger(library).setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    os.environ.setdefault("PYTHONWARNINGS", "ignore")
    for name, value in MLFLOW_QUIET.items():
        os.environ.setdefault(name, value)
