"""What a spec becomes on a cluster, as files, and how they differ from what is there."""

from __future__ import annotations

import difflib
import json
import re
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from components.train.cluster_job import rendered
from components.train.config import TrainStage
from k8s.launchers import Processes, read_launch
from k8s.training import Training
from pipelines.placement import launcher_of
from pipelines.spec import PipelineSpec
from pipelines.submit import Target, compile_for, named

if TYPE_CHECKING:
    import kfp

OVERLAYS = Path(__file__).parents[1] / "k8s" / "overlays"
PIPELINE = "pipeline.yaml"
RUN = "RUN"
"""Stands for the identity that a run gets from Kubeflow."""


def render(spec: PipelineSpec, target: Target, *, overlay: str = "") -> dict[str, str]:
    """Everything that the cluster would be given, text by file name.

    Args:
        spec: Checked spec.
        target: Where on the cluster it works.
        overlay: Folder of kustomize manifests, such as `prod-gpu`; empty leaves them out.

    Raises:
        ValueError: There is no such overlay, or kubectl is missing.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / PIPELINE
        compile_for(spec, target, path=path)
        files = {path.name: path.read_text(encoding="utf-8")}
    stages = {"pretrain": spec.pretrain_stage, "finetune": spec.finetune_stage}
    for name, stage in stages.items():
        files.update(_job(name, stage, spec=spec, target=target))
    if overlay:
        files["manifests.yaml"] = _kustomized(overlay)
    return files


def _job(name: str, stage: TrainStage, *, spec: PipelineSpec, target: Target) -> dict[str, str]:
    """The job that a training stage's launcher will create; none where it starts processes."""
    text = launcher_of(
        spec.placement,
        resources=getattr(spec.resources, name),
        image=spec.image,
        volume=target.volume,
    )
    launch = read_launch(text)
    if isinstance(launch, Processes):
        return {}
    training = Training(
        run_id=RUN,
        run_name=spec.name,
        stage=name,
        command=("python3", "-m", "components.train.agent", f"{target.workdir}/{RUN}/job.json"),
        num_nodes=stage.topology.num_nodes,
        processes_per_node=stage.topology.processes_per_node,
        environment={"OMP_NUM_THREADS": str(stage.topology.threads_per_process)},
        passing_environment={},
        content_sha256="0" * 64,
        pods=launch.pods,
    )
    kind, manifest = rendered(launch, training=training)
    return {f"{name}-{kind.plural}.yaml": yaml.safe_dump(manifest, sort_keys=False)}


def _kustomized(overlay: str) -> str:
    folder = OVERLAYS / overlay
    if not (folder / "kustomization.yaml").is_file():
        known = ", ".join(sorted(path.name for path in OVERLAYS.iterdir()))
        raise ValueError(f"--overlay {overlay} does not exist; choose one of {known}")
    try:
        done = subprocess.run(
            ["kubectl", "kustomize", str(folder)], capture_output=True, text=True, check=True
        )
    except FileNotFoundError as error:
        raise ValueError("--overlay needs kubectl; install it, or leave the flag out") from error
    except subprocess.CalledProcessError as error:
        raise ValueError(f"kustomize refuses {folder.name}: {error.stderr.strip()}") from error
    return done.stdout


def write_files(files: Mapping[str, str], directory: Path) -> None:
    """Write the files, and remove those of an earlier plan that are no more."""
    directory.mkdir(parents=True, exist_ok=True)
    for old in read_files(directory).keys() - files.keys():
        (directory / old).unlink()
    for name, text in files.items():
        (directory / name).write_text(text, encoding="utf-8")


def read_files(directory: Path) -> dict[str, str]:
    """The files of an earlier plan; none where there is no such directory."""
    return {path.name: path.read_text(encoding="utf-8") for path in directory.glob("*.yaml")}


def differences(deployed: Mapping[str, str], planned: Mapping[str, str]) -> str:
    """Unified diff of every file, empty where nothing changes.

    JSON inside the files is laid out line by line and compiler versions are left out, so that a
    changed setting shows as one line.

    Args:
        deployed: What is there, text by file name.
        planned: What would be.
    """
    parts = []
    for name in sorted({*deployed, *planned}):
        if name not in deployed or name not in planned:
            is_new = name in planned
            count = len((planned if is_new else deployed)[name].splitlines())
            parts.append(f"{name} is {'new' if is_new else 'not there any more'}, {count} lines")
            continue
        old, new = (_readable(files[name]) for files in (deployed, planned))
        parts += difflib.unified_diff(
            old, new, f"deployed/{name}", f"planned/{name}", lineterm="", n=2
        )
    return "\n".join(parts)


def _readable(text: str) -> list[str]:
    documents = [_opened(document) for document in yaml.safe_load_all(text) if document]
    return yaml.safe_dump_all(documents, sort_keys=True, width=100).splitlines()


def _opened(value: object) -> object:
    """The same with strings that hold JSON objects replaced by the objects."""
    match value:
        case dict():
            return {key: _opened(item) for key, item in value.items() if key != "sdkVersion"}
        case list():
            return [_opened(item) for item in value]
        case str() if re.match(r"\s*\{.*\}\s*$", value, re.DOTALL):
            try:
                return _opened(json.loads(value))
            except json.JSONDecodeError:
                return value
        case _:
            return value


def deployed_on(client: kfp.Client, *, pipeline: str) -> dict[str, str]:
    """The newest version of a pipeline on the server, as a file; none where there is none.

    Jobs live no longer than their run, and what kustomize gives is compared by `kubectl diff`.

    Args:
        client: Any client.
        pipeline: Name, such as `dinopipe-demo`.
    """
    namespace = client.get_user_namespace() or None
    found = client.list_pipelines(namespace=namespace, filter=named(pipeline))
    ids = [item.pipeline_id for item in found.pipelines or () if item.display_name == pipeline]
    if not ids:
        return {}
    newest = client.list_pipeline_versions(ids[0], page_size=1, sort_by="created_at desc")
    if not newest.pipeline_versions:
        return {}
    content = newest.pipeline_versions[0].pipeline_spec
    documents = [content.get("pipeline_spec", content), content.get("platform_spec")]
    return {PIPELINE: yaml.safe_dump_all([item for item in documents if item])}
