"""A rank that works for ever: its process id is in the job's directory."""

from __future__ import annotations

import os

from components.ranks.worker_main import worker_process
from components.train.job import Job

if __name__ == "__main__":
    with worker_process(None, kind=Job) as (job, stop):
        (job.root / "pid").write_text(str(os.getpid()))
        while True:
            stop.wait(60)
