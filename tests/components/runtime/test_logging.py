from __future__ import annotations

import subprocess
import sys

CODE = """
import logging, warnings
from components.runtime.logging import set_up_logging
set_up_logging()
logging.getLogger("components.x").info("ours")
logging.getLogger("dinov2_core.x").warning("a warning")
logging.getLogger("components.x").error("an error")
logging.getLogger("alembic.runtime").info("theirs")
logging.getLogger("mlflow.x").warning("theirs")
warnings.warn("a library's warning")
"""


def output(**environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", CODE], env=environment, capture_output=True, text=True, check=True
    )
    return done.stderr


def test_our_lines_are_plain_and_libraries_are_quiet() -> None:
    assert output() == "ours\na warning\nan error\n"


def test_other_ranks_show_warnings_and_errors_with_their_number_and_no_more() -> None:
    assert output(RANK="3") == "[rank 3] a warning\n[rank 3] an error\n"
    assert output(RANK="0") == "ours\na warning\nan error\n"
