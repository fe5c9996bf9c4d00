"""A rank that works for ever: its process id is in the job's directory."""

from __future__ import annotations

import os
import sys
import threading

from components.ranks.worker_main import run_rank
from components.train.job import Job


def _sleep(job: Job, stop: threading.Event) -> bool:
    (job.root / "pid").write_text(str(os.getpid()))
    threading.Event().wait(600)
    return stop.is_set()


if __name__ == "__main__":
    sys.exit(run_rank(None, kind=Job, work=_sleep))
