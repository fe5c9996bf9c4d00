"""agent: torchrun's flags, but no traceback of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def test_a_failed_rank_gives_one_and_only_its_own_words(tmp_path: Path) -> None:
    script = tmp_path / "rank.py"
    script.write_text("import sys\nsys.exit('my own words')\n")
    command = [sys.executable, "-W", "ignore", "-m", "components.train.agent", "--standalone"]
    ended = subprocess.run([*command, str(script)], capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert ended.stderr.strip() == "my own words"
