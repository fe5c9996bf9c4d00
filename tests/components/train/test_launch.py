"""launch: real ranks under torchrun, killed, stopped and started again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import mlflow
import psutil
import pytest
from safetensors.numpy import load_file

from components.runtime.context import RunContext
from components.runtime.manifests import CheckpointManifest, DatasetManifest, digest_of_file
from components.runtime.progress import Progress
from components.runtime.storage import read_text, write_text
from components.train.config import Probe, Topology, TrainStage
from components.train.job import last_rows
from components.train.launch import main, starting_weights
from dinov2_core.config.training import HighResolution
from dinov2_core.errors import ExitCode, SettingsError, UserError

Flags = Callable[[TrainStage, DatasetManifest], list[str]]


def wait_for(found: Callable[[], bool], *, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not found():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.02)


def workers(launcher: subprocess.Popen[bytes]) -> list[psutil.Process]:
    below = psutil.Process(launcher.pid).children(recursive=True)
    return [p for p in below if p.cmdline()[1:4] == ["-u", "-m", "components.train.worker"]]


def start(flags: list[str], output: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "components.train", "--phase", "pretrain", *flags]
    return subprocess.Popen([*command, "--output", str(output)])


def logged_steps(context: RunContext) -> Counter[int]:
    client = mlflow.MlflowClient(context.resolved_tracking_uri)
    (experiment,) = (e for e in client.search_experiments() if e.name == context.experiment)
    runs = client.search_runs([experiment.experiment_id], "tags.`dinopipe.stage` = 'pretrain'")
    assert len(runs) == 1
    history = client.get_metric_history(runs[0].info.run_id, "loss/total")
    return Counter(point.step for point in history)


def test_a_killed_and_a_stopped_run_go_on_without_a_gap(
    stage: TrainStage, dataset: DatasetManifest, flags: Flags, context: RunContext, tmp_path: Path
) -> None:
    arguments, output = flags(stage, dataset), tmp_path / "out.json"

    def has_checkpoint(step: int) -> bool:
        return any(context.root.glob(f"stages/pretrain/*/checkpoints/step_{step:08d}"))

    launcher = start(arguments, output)
    wait_for(lambda: has_checkpoint(10))
    workers(launcher)[0].kill()
    assert launcher.wait(timeout=60) == 1

    launcher = start(arguments, output)
    wait_for(lambda: has_checkpoint(25))
    (worker,) = workers(launcher)
    launcher.send_signal(signal.SIGTERM)
    assert launcher.wait(timeout=60) == ExitCode.STOPPED
    assert not worker.is_running()
    assert not output.exists()

    assert start(arguments, output).wait(timeout=100) == 0
    assert logged_steps(context) == Counter(range(60))
    manifest = CheckpointManifest.read(output)
    assert manifest.step == 60
    assert manifest.images_per_second > 0
    assert set(manifest.final_losses) == {"total", "dino_local", "dino_global", "ibot", "koleo"}
    assert manifest.sha256 == digest_of_file(Path(manifest.teacher_uri))
    assert manifest.teacher.image_size_pixels == 16
    rows = last_rows(Path(manifest.teacher_uri).with_name("metrics.jsonl"), 100)
    assert len(rows) == 60
    progress = context.progress_directory / "pretrain.json"
    assert Progress.model_validate_json(progress.read_text()).state == "succeeded"


def test_ranks_die_with_their_launcher(
    stage: TrainStage, dataset: DatasetManifest, flags: Flags, context: RunContext, tmp_path: Path
) -> None:
    launcher = start(flags(stage, dataset), tmp_path / "out.json")
    wait_for(lambda: any(context.root.glob("stages/pretrain/*/checkpoints/step_*")))
    below = psutil.Process(launcher.pid).children(recursive=True)
    os.kill(launcher.pid, signal.SIGKILL)
    launcher.wait(timeout=10)
    _gone, alive = psutil.wait_procs(below, timeout=10)
    assert not alive


def test_finetune_starts_from_the_pretrained_teacher(
    stage: TrainStage, dataset: DatasetManifest, flags: Flags, tmp_path: Path
) -> None:
    short = stage.learning.optimization.model_copy(update={"num_steps": 2})
    learning = stage.learning.model_copy(update={"optimization": short})
    stage = stage.model_copy(
        update={"learning": learning, "topology": Topology(processes_per_node=2)}
    )
    pretrained, finetuned = tmp_path / "pretrained.json", tmp_path / "finetuned.json"
    arguments = ["--phase", "pretrain", *flags(stage, dataset), "--output", str(pretrained)]
    assert main(arguments) == 0
    high = HighResolution(
        num_steps=1, global_crop_size_pixels=24, local_crop_size_pixels=8, global_batch_size=4
    )
    finetune = stage.model_copy(
        update={"learning": learning.at_high_resolution(high), "topology": Topology()}
    )
    flags_of_finetune = ["--phase", "finetune", *flags(finetune, dataset)]
    flags_of_finetune += ["--pretrained", str(pretrained), "--output", str(finetuned)]
    assert main(flags_of_finetune) == 0
    before, after = CheckpointManifest.read(pretrained), CheckpointManifest.read(finetuned)
    assert after.teacher.image_size_pixels == 24
    assert [parent.kind for parent in after.parents] == ["dataset", "checkpoint"]
    old, new = load_file(before.teacher_uri), load_file(after.teacher_uri)
    assert new["backbone.pos_embed"].shape == (1, 37, 32)
    assert old["ibot_head.mlp.0.weight"] == pytest.approx(new["ibot_head.mlp.0.weight"], abs=0.01)
    modified = Path(after.teacher_uri).stat().st_mtime_ns
    assert main(flags_of_finetune) == 0
    assert Path(after.teacher_uri).stat().st_mtime_ns == modified


def test_a_worker_tells_what_is_wrong(
    stage: TrainStage, dataset: DatasetManifest, flags: Flags, tmp_path: Path
) -> None:
    weights = tmp_path / "weights.safetensors"
    weights.write_bytes(b"not one")
    stage = stage.model_copy(update={"initial_weights": str(weights)})
    arguments = ["--phase", "pretrain", *flags(stage, dataset), "--output", str(tmp_path / "o")]
    with pytest.raises(UserError, match=r"^weights .* are not a safetensors file"):
        main(arguments)


def test_wrong_input_is_refused_before_anything_starts(
    stage: TrainStage, dataset: DatasetManifest, flags: Flags, tmp_path: Path
) -> None:
    output = ["--output", str(tmp_path / "out.json"), "--phase", "pretrain"]
    small = dataset.model_copy(update={"num_kept": 7})
    with pytest.raises(ValueError, match="global_batch_size 8 is more than the 7 images"):
        main([*flags(stage, small), *output])
    many = stage.model_copy(update={"topology": Topology(num_nodes=2)})
    with pytest.raises(SettingsError, match=r"topology\.num_nodes 2 needs a cluster launcher"):
        main([*flags(many, dataset), *output])
    absent = stage.model_copy(update={"initial_weights": "/absent"})
    with pytest.raises(ValueError, match="weights /absent named by initial_weights do not exist"):
        main([*flags(absent, dataset), *output])
    unprobed = stage.model_copy(update={"probe": Probe(train="/absent")})
    with pytest.raises(ValueError, match="probe images /absent do not exist"):
        main([*flags(unprobed, dataset), *output])
    with pytest.raises(SystemExit, match="2"):
        main([*flags(stage, dataset), "--output", "o", "--phase", "finetune"])
    assert not (tmp_path / "work" / "stages").exists()


def test_starting_weights_of_elsewhere_are_put_where_all_nodes_see_them(
    stage: TrainStage, context: RunContext, s3: str, tmp_path: Path
) -> None:
    stored = context.model_copy(update={"workdir": "s3://pile/run", "tracking_uri": "sqlite://"})
    write_text("s3://pile/released/w.safetensors", "weights")
    remote = stage.model_copy(update={"initial_weights": "s3://pile/released/w.safetensors"})
    place = starting_weights(remote, pretrained=None, context=stored)
    assert place.startswith("s3://pile/run/weights/")
    assert read_text(place) == "weights"
    path = tmp_path / "w.safetensors"
    path.write_text("weights")
    shared = stage.model_copy(update={"initial_weights": str(path)})
    assert starting_weights(shared, pretrained=None, context=stored) == str(path)
