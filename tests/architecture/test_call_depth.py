"""The way from a worker's `main` to the DINO loss is short, so that tracebacks show the method."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from components.runtime.context import RunContext
from components.runtime.manifests import DatasetManifest
from components.train.config import TrainStage
from components.train.job import Job
from tests.components.train.conftest import dataset, stage  # noqa: F401

REPOSITORY = Path(__file__).parents[2]
MAX_FRAMES = 7

TRACED_WORKER = """
import os
import sys
from pathlib import Path
from components.train import reporter, worker  # the reporter would be loaded later, and slowly

def note_loss(frame, event, argument):
    if event != "call" or not frame.f_code.co_filename.endswith("dinov2_core/losses/dino.py"):
        return
    sys.setprofile(None)
    while frame is not None:
        code = frame.f_code
        path = Path(code.co_filename)
        if code.co_name != "<module>" and path.is_relative_to(sys.argv[2]):
            package = path.relative_to(sys.argv[2])
            if package.parts[0] in ("components", "dinov2_core"):
                print(package, code.co_qualname, flush=True)
        frame = frame.f_back
    os._exit(0)  # all is known

sys.setprofile(note_loss)
sys.exit(worker.main(sys.argv[1:2]))
"""


def test_few_frames_of_our_own_lie_between_main_and_the_dino_loss(
    stage: TrainStage,  # noqa: F811
    dataset: DatasetManifest,  # noqa: F811
    tmp_path: Path,
) -> None:
    context = RunContext(workdir=str(tmp_path), run_name="depth", tracking_uri="http://127.0.0.1:9")
    job = Job(
        stage_name="pretrain",
        stage=stage,
        context=context,
        directory=str(tmp_path / "stage"),
        shards=dataset.shards_uri,
        mlflow_run_id="absent",
    )
    job.write()
    done = subprocess.run(
        [sys.executable, "-c", TRACED_WORKER, job.uri, str(REPOSITORY)],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        check=True,
        timeout=200,
    )
    frames = done.stdout.splitlines()
    assert frames[-1] == "components/train/worker.py main"
    assert frames[0].startswith("dinov2_core/losses/dino.py")
    assert len(frames) <= MAX_FRAMES, "\n".join(frames)
