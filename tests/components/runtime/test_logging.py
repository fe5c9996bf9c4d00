from __future__ import annotations

import subprocess
import sys

CODE = """
import logging, warnings
from components.runtime.logging import set_up_logging
set_up_logging()
logging.getLogger("components.x").info("information")
logging.getLogger("components.x").warning("a warning")
logging.getLogger("dinov2_core.x").error("an error")
logging.getLogger("alembic.runtime").info("theirs")
logging.getLogger("mlflow.x").warning("theirs")
warnings.warn_explicit("nobody can act on this", UserWarning, "f.py", 1, module="mlflow.store.x")
warnings.warn_explicit("somebody should read this", UserWarning, "g.py", 2, module="other")
"""
WARNINGS = ["a warning", "an error", "g.py:2: UserWarning: somebody should read this"]


def output(**environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", CODE], env=environment, capture_output=True, text=True, check=True
    )
    return done.stderr


def test_our_lines_are_plain_and_only_named_libraries_are_quiet() -> None:
    assert output().split("\n")[:4] == ["information", *WARNINGS]


def test_other_ranks_show_warnings_and_errors_with_their_number_and_no_information() -> None:
    assert output(RANK="3").split("\n")[:3] == [f"[rank 3] {line}" for line in WARNINGS]
    assert output(RANK="0").split("\n")[:4] == ["information", *WARNINGS]
