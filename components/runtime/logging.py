"""Log lines of a process: set up once, at its entry point."""

from __future__ import annotations

import logging
import os
import sys
import traceback
import warnings

from dinov2_core.errors import ExitCode, exit_code_of, message_of, shows_traceback

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
"""Libraries whose warnings say nothing about a run; their errors are shown."""

MLFLOW_QUIET = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_LOGGING_LEVEL": "ERROR",
}
"""Set before MLflow is imported, it neither reports home nor draws bars into a log."""

IGNORED_WARNINGS = (
    r"mlflow\.",  # how it uses SQLAlchemy and pandas, and that a path may be two kinds of source
    r"torch\.distributed\.c10d_logger",  # new names of collectives that earlier torch does not have
)
"""Modules whose Python warnings nobody but their authors can act on; all others are logged."""

logger = logging.getLogger(__name__)


def set_up_logging() -> None:
    """Plain lines on standard error: own messages from INFO, libraries' from WARNING or ERROR.

    Ranks other than 0 leave progress and other information to rank 0; their warnings and errors
    begin with the rank.
    """
    rank = os.environ.get("RANK", "0")
    is_main_rank = rank == "0"
    prefix = "" if is_main_rank else f"[rank {rank}] "
    logging.basicConfig(
        level=logging.WARNING, format=f"{prefix}%(message)s", stream=sys.stderr, force=True
    )
    for ours in ("components", "dinov2_core", "pipelines", "k8s"):
        logging.getLogger(ours).setLevel(logging.INFO if is_main_rank else logging.WARNING)
    for library in QUIET:
        logging.getLogger(library).setLevel(logging.ERROR)
    logging.captureWarnings(True)
    for module in IGNORED_WARNINGS:
        warnings.filterwarnings("ignore", module=module)
    for name, value in MLFLOW_QUIET.items():
        os.environ.setdefault(name, value)


def log_error(error: BaseException, *, name: str = "") -> ExitCode:
    """Log what ends a process, with its traceback only where that helps; its exit code.

    Args:
        error: Any.
        name: What failed, put before the message.
    """
    if shows_traceback(error):
        logger.error("%s", "".join(traceback.format_exception(error)).rstrip())
    else:
        message = message_of(error)
        logger.error("%s", f"{name}: {message}" if name else message)
    return exit_code_of(error)
