from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from components.curate.job import SCANS
from components.curate.main import WITH_DEFECTS, main
from components.runtime.context import RunContext
from components.runtime.manifests import DatasetManifest
from components.runtime.storage import download, exists
from dinov2_core.data.shards import ShardReader
from dinov2_core.errors import InputError, SettingsError
from k8s.launchers import TrainJob, launch_of
from k8s.placement import PodResources
from tests.components.train.networks import two_machines
from tests.components.train.trainer import Trainer, kubeconfig
from tests.golden.manifests import BARE
from tests.k8s.api_server import api_server


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, photographs: list[bytes]) -> Path:
    """40 photographs and an evaluation set of 20 others."""
    folder = tmp_path_factory.mktemp("curate")
    (folder / "images").mkdir()
    for number, content in enumerate(photographs[:40]):
        (folder / "images" / f"{number:02d}.png").write_bytes(content)
    table = pa.table({"image": photographs[40:60], "label": ["x"] * 20})
    parquet.write_table(table, folder / "evaluation.parquet")
    return folder


def flags(
    folder: Path, output: Path, context: RunContext, *, defects: dict[str, int], **settings: object
) -> list[str]:
    images: dict[str, object] = {"uri": str(folder / "images")}
    if defects:
        images["synthetic_defects"] = defects
    config = {
        "images": images,
        "evaluation_images": [str(folder / "evaluation.parquet")],
        "settings": settings,
    }
    given = ["--config", json.dumps(config), "--context", context.model_dump_json()]
    return [*given, "--output", str(output)]


def curated(folder: Path, workdir: Path, **defects: int) -> DatasetManifest:
    output = workdir / "dataset.json"
    context = RunContext(workdir=str(workdir), run_id="r", run_name="r")
    assert main(flags(folder, output, context, defects=defects)) == 0
    return DatasetManifest.read(output)


def test_synthetic_defects_are_found_and_counts_add_up(folder: Path, tmp_path: Path) -> None:
    dataset = curated(folder, tmp_path, exact_copies=6, near_copies=6, leaks=4, corrupt=10)
    assert dataset.num_images == 40 + 26
    assert dataset.counts_add_up()
    assert dataset.audit is not None
    assert dataset.audit.exact_recall == 1.0
    assert dataset.audit.leak_recall == 1.0
    assert dataset.audit.corrupt_recall == 1.0
    assert not Path(dataset.uri, WITH_DEFECTS, "ground_truth.parquet").exists()
    table = parquet.read_table(dataset.table_uri)
    assert table.num_rows == dataset.num_images
    assert sum(table["kept"].to_pylist()) == dataset.num_kept
    with ShardReader(Path(dataset.shards_uri)) as reader:
        kept = set(table.filter(table["kept"])["sha256"].to_pylist())
        assert {reader.entry(i).sha256 for i in range(len(reader))} == kept


def test_another_workdir_gives_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    made = [
        curated(folder, tmp_path / name, exact_copies=4, near_copies=4, leaks=2, corrupt=5)
        for name in ("one", "two")
    ]
    assert made[0].sha256 == made[1].sha256
    tables = [Path(dataset.table_uri).read_bytes() for dataset in made]
    assert tables[0] == tables[1]


def test_an_empty_folder_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "evaluation.parquet").write_bytes((folder / "evaluation.parquet").read_bytes())
    with pytest.raises(InputError, match="holds no file; name a folder"):
        curated(tmp_path, tmp_path / "work")


def test_images_of_which_none_can_be_used_are_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(b"text")
    (tmp_path / "evaluation.parquet").write_bytes((folder / "evaluation.parquet").read_bytes())
    with pytest.raises(
        InputError, match=r"none of the 1 files .* can be used: 1 not_an_image; name a folder with"
    ):
        curated(tmp_path, tmp_path / "work")


RANKS = {"processes_per_node": 2, "threads_per_process": 1, "loader_threads": 1}


@pytest.mark.parametrize("kind", ["disk", "store"])
def test_ranks_make_the_same_data_set(
    folder: Path, context: RunContext, s3: str, tmp_path: Path, kind: str
) -> None:
    defects = {"exact_copies": 4, "near_copies": 4, "leaks": 2, "corrupt": 5}
    output = tmp_path / "dataset.json"
    assert main(flags(folder, output, context, defects=defects)) == 0
    alone = DatasetManifest.read(output)
    changes = {
        "workdir": str(tmp_path / "other") if kind == "disk" else "s3://pile/run",
        "tracking_uri": context.resolved_tracking_uri,
    }
    given = flags(
        folder,
        output,
        context.model_copy(update=changes),
        defects=defects,
        embedding_topology=RANKS,
    )
    assert main(given) == 0
    shared = DatasetManifest.read(output)
    assert shared.sha256 == alone.sha256
    assert download(shared.table_uri).read_bytes() == Path(alone.table_uri).read_bytes()
    assert exists(shared.uri + "/job.json"), "the test itself: ranks were at work"
    assert not exists(f"{shared.uri}/{SCANS}"), "scans are of no use any more"
    assert kind == "disk" or not exists(f"{shared.uri}/{WITH_DEFECTS}")
    modified = download(shared.table_uri).stat().st_mtime_ns
    assert main(given) == 0
    assert download(shared.table_uri).stat().st_mtime_ns == modified, "nothing is done twice"


def test_ranks_that_cannot_be_started_are_refused_before_work(
    folder: Path, context: RunContext, tmp_path: Path
) -> None:
    def given(**topology: int) -> list[str]:
        return flags(folder, tmp_path / "o", context, defects={}, embedding_topology=topology)

    with pytest.raises(
        SettingsError, match=r"curate\.embedding_topology\.num_nodes 2 needs a cluster launcher"
    ):
        main(given(num_nodes=2))
    with pytest.raises(SettingsError, match="num_replicas 2 has no effect"):
        main(given(num_nodes=2, num_replicas=2))
    resources = PodResources(cpu="2", memory="4Gi", num_gpus=1)
    launch = launch_of(TrainJob(), pods=BARE.model_copy(update={"resources": resources}))
    with pytest.raises(SettingsError, match="processes_per_node 2 is more than the 1 GPUs of each"):
        main([*given(processes_per_node=2), "--launcher", launch.model_dump_json()])
    assert not (context.root / "stages").exists()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_step_follows_ranks_on_pods_of_their_own_to_the_same_data_set(
    folder: Path, context: RunContext, tmp_path: Path
) -> None:
    alone, output = curated(folder, tmp_path / "alone"), tmp_path / "dataset.json"
    topology = {"num_nodes": 2, "threads_per_process": 1, "loader_threads": 1}
    given = flags(folder, output, context, defects={}, embedding_topology=topology)
    launch = launch_of(TrainJob(), pods=BARE)
    with two_machines() as machines, api_server() as server:
        trainer = Trainer(server, machines, logs=tmp_path, port=29541)
        trainer.start()
        step = subprocess.run(
            [
                *(sys.executable, "-m", "components.curate", *given),
                *("--launcher", launch.model_dump_json()),
            ],
            env=os.environ | {"KUBECONFIG": str(kubeconfig(server.address, tmp_path))},
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert step.returncode == 0, step.stderr
    assert DatasetManifest.read(output).sha256 == alone.sha256
    assert "[curate] embedding · image 40/40" in step.stderr
    lines = [line for line in step.stderr.splitlines() if line.startswith("TrainJob test-")]
    assert lines[0].endswith("-curate: created")
    assert lines[-1].endswith("-curate: complete (AllJobsCompleted)")
