from __future__ import annotations

import subprocess
import sys

CODE = """
import logging, warnings
from components.runtime.logging import set_up_logging
set_up_logging()
logging.getLogger("components.x").info("ours")
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
    assert output() == "ours\n"


def test_other_ranks_say_which_they_are() -> None:
    assert output(RANK="3") == "[rank 3] ours\n"
    assert output(RANK="0") == "ours\n"
