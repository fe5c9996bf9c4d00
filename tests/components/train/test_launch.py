"""launch: real ranks under torchrun, killed, stopped and started again."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import mlflow
import psutil
import pytest
from safetensors.numpy import load_file

from components.runtime.context import RunContext
from components.runtime.manifests import CheckpointManifest, DatasetManifest, digest_of_file
from components.runtime.metric_rows import MetricRow, last_rows
from components.runtime.progress import Progress
from components.runtime.storage import read_text, write_text
from components.train.config import Probe, Topology, TrainStage
from components.train.job import MARKER
from components.train.launch import main, starting_weights
from dinov2_core.config.training import HighResolution
from dinov2_core.errors import ExitCode, InputError, SettingsError, UserError
from tests.components.train.conftest import flags_of, new_context

Flags = Callable[[TrainStage, DatasetManifest], list[str]]


def wait_for(found: Callable[[], bool]) -> None:
    end = time.monotonic() + 240
    while not found():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.02)


def below(launcher: subprocess.Popen[bytes]) -> list[psutil.Process]:
    return psutil.Process(launcher.pid).children(recursive=True)


def worker_of(launcher: subprocess.Popen[bytes]) -> psutil.Process:
    command = ["-u", "-m", "components.train.worker"]
    (worker,) = (process for process in below(launcher) if process.cmdline()[1:4] == command)
    return worker


def logged_steps(context: RunContext, stage: str) -> Counter[int]:
    client = mlflow.MlflowClient(context.resolved_tracking_uri)
    (experiment,) = (e for e in client.search_experiments() if e.name == context.experiment)
    (run,) = client.search_runs([experiment.experiment_id], f"tags.`dinopipe.stage` = '{stage}'")
    history = client.get_metric_history(run.info.run_id, "loss/total")
    return Counter(point.step for point in history)


@dataclass(frozen=True, kw_only=True)
class Disturbed:
    """A pretraining that was killed twice, then stopped, before it came to its end."""

    context: RunContext
    code_after_kill: int
    """Exit code of the launcher whose worker was killed."""
    survivors: list[psutil.Process]
    """Processes that lived on after their launcher was killed."""
    code_after_stop: int
    has_stopped: bool
    """Whether there was neither a worker nor a manifest after SIGTERM."""
    last_code: int
    manifest: Path


@pytest.fixture(scope="module")
def disturbed(
    stage: TrainStage,
    dataset: DatasetManifest,
    store: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Disturbed:
    context = new_context(store, tmp_path_factory.mktemp("disturbed"))
    output = context.root.with_name("out.json")
    command = [sys.executable, "-m", "components.train", "--phase", "pretrain"]
    command += [*flags_of(context, stage, dataset), "--output", str(output)]

    def start_and_wait_for(step: int) -> subprocess.Popen[bytes]:
        launcher = subprocess.Popen(command)
        checkpoint = f"stages/pretrain/*/checkpoints/step_{step:08d}"
        wait_for(lambda: any(context.root.glob(checkpoint)))
        return launcher

    first = start_and_wait_for(5)
    worker_of(first).kill()
    code_after_kill = first.wait(timeout=240)

    second = start_and_wait_for(15)
    processes = below(second)
    second.kill()
    second.wait(timeout=240)
    _gone, survivors = psutil.wait_procs(processes, timeout=30)

    third = start_and_wait_for(25)
    worker = worker_of(third)
    third.send_signal(signal.SIGTERM)
    code_after_stop = third.wait(timeout=240)
    has_stopped = not worker.is_running() and not output.exists()

    return Disturbed(
        context=context,
        code_after_kill=code_after_kill,
        survivors=survivors,
        code_after_stop=code_after_stop,
        has_stopped=has_stopped,
        last_code=subprocess.run(command, check=False, timeout=240).returncode,
        manifest=output,
    )


@pytest.mark.timeout(900)
def test_a_killed_and_a_stopped_run_go_on_without_a_gap(disturbed: Disturbed) -> None:
    assert disturbed.code_after_kill == 1
    assert disturbed.code_after_stop == ExitCode.STOPPED
    assert disturbed.has_stopped
    assert disturbed.last_code == 0
    assert logged_steps(disturbed.context, "pretrain") == Counter(range(60))
    manifest = CheckpointManifest.read(disturbed.manifest)
    assert manifest.step == 60
    assert manifest.images_per_second > 0
    assert set(manifest.final_losses) == {"total", "dino_local", "dino_global", "ibot", "koleo"}
    assert manifest.sha256 == digest_of_file(Path(manifest.teacher_uri))
    assert manifest.teacher.image_size_pixels == 16
    rows = last_rows(Path(manifest.teacher_uri).with_name("metrics.jsonl"), 100)
    assert len(rows) == 60
    progress = disturbed.context.progress_directory / "pretrain.json"
    assert Progress.model_validate_json(progress.read_text()).state == "succeeded"


def test_ranks_die_with_their_launcher(disturbed: Disturbed) -> None:
    assert disturbed.survivors == []


@pytest.mark.timeout(900)
def test_finetune_starts_from_the_pretrained_teacher(
    stage: TrainStage, dataset: DatasetManifest, disturbed: Disturbed, tmp_path: Path
) -> None:
    finetuned = tmp_path / "finetuned.json"
    high = HighResolution(
        num_steps=1, global_crop_size_pixels=24, local_crop_size_pixels=8, global_batch_size=4
    )
    finetune = stage.model_copy(
        update={
            "learning": stage.learning.at_high_resolution(high),
            "topology": Topology(processes_per_node=2),
        }
    )
    flags = ["--phase", "finetune", *flags_of(disturbed.context, finetune, dataset)]
    flags += ["--pretrained", str(disturbed.manifest), "--output", str(finetuned)]
    assert main(flags) == 0
    before, after = (CheckpointManifest.read(path) for path in (disturbed.manifest, finetuned))
    assert after.teacher.image_size_pixels == 24
    assert [parent.kind for parent in after.parents] == ["dataset", "checkpoint"]
    old, new = load_file(before.teacher_uri), load_file(after.teacher_uri)
    assert new["backbone.pos_embed"].shape == (1, 37, 32)
    assert old["ibot_head.mlp.0.weight"] == pytest.approx(new["ibot_head.mlp.0.weight"], abs=0.01)
    modified = Path(after.teacher_uri).stat().st_mtime_ns
    metrics = Path(after.teacher_uri).with_name("metrics.jsonl")
    with metrics.open("ab") as file:  # as if MLflow had been away at the end
        file.write(MetricRow.made_now(1, {MARKER: 0.5, "loss/total": 0.5}).line)
    metrics.with_name("metrics.jsonl.unsent").touch()
    assert main(flags) == 0
    assert Path(after.teacher_uri).stat().st_mtime_ns == modified
    assert logged_steps(disturbed.context, "finetune") == Counter(range(2))


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
    with pytest.raises(SettingsError, match="global_batch_size 8 is more than the 7 images"):
        main([*flags(stage, small), *output])
    many = stage.model_copy(update={"topology": Topology(num_nodes=2)})
    with pytest.raises(SettingsError, match=r"topology\.num_nodes 2 needs a cluster launcher"):
        main([*flags(many, dataset), *output])
    absent = stage.model_copy(update={"initial_weights": "/absent"})
    with pytest.raises(InputError, match="weights /absent named by initial_weights do not exist"):
        main([*flags(absent, dataset), *output])
    unprobed = stage.model_copy(update={"probe": Probe(train="/absent")})
    with pytest.raises(InputError, match="pretrain.probe: folder /absent does not exist"):
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
