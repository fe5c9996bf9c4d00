"""What a spec becomes on a cluster, as files, and how they differ from what is there."""

from __future__ import annotations

import difflib
import json
import re
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from k8s.difference import without_secrets
from pipelines.cluster.submit import Target, compile_for, display_name_filter
from pipelines.plan.jobs import PHASES, planned_job
from pipelines.spec.pipeline_spec import PipelineSpec

if TYPE_CHECKING:
    import kfp

OVERLAYS = Path(__file__).parents[2] / "k8s" / "overlays"
PIPELINE = "pipeline.yaml"
KUSTOMIZATION = "kustomization.yaml"

Object = dict[str, Any]
Files = dict[str, str]


def render(spec: PipelineSpec, target: Target, *, manifests: Sequence[Object] = ()) -> Files:
    """Everything that the cluster would be given, text by file name.

    Args:
        spec: Checked spec.
        target: Where on the cluster it works.
        manifests: What kustomize builds; may be empty.

    Raises:
        ValueError: The spec's tracking server cannot be named in a manifest, or is none.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / PIPELINE
        compile_for(spec, target, path=path)
        files = {path.name: path.read_text(encoding="utf-8")}
    for phase in PHASES:
        planned = planned_job(phase, spec, target)
        if planned is not None:
            kind, manifest = planned
            files[f"{phase}-{kind.plural}.yaml"] = yaml.safe_dump(manifest, sort_keys=False)
    if manifests:
        files["manifests.yaml"] = yaml.safe_dump_all(manifests, sort_keys=False)
    return files


def built_manifests(overlay: str) -> list[Object]:
    """What kustomize builds of an overlay; Secrets keep their keys, not their values.

    Args:
        overlay: One that we ship, such as `prod-gpu`, or a directory with a kustomization.yaml.

    Raises:
        ValueError: There is no such overlay, kustomize refuses it, or kubectl is missing.
    """
    folder = Path(overlay)
    if not (folder / KUSTOMIZATION).is_file():
        folder = OVERLAYS / overlay
    if not (folder / KUSTOMIZATION).is_file():
        known = ", ".join(sorted(path.name for path in OVERLAYS.iterdir()))
        raise ValueError(
            f"--overlay {overlay} does not exist; choose one of {known}, or a directory with a "
            f"{KUSTOMIZATION}"
        )
    try:
        done = subprocess.run(
            ["kubectl", "kustomize", str(folder)], capture_output=True, text=True, check=True
        )
    except FileNotFoundError as error:
        raise ValueError("--overlay needs kubectl; install it, or leave the flag out") from error
    except subprocess.CalledProcessError as error:
        raise ValueError(f"kustomize refuses {folder}: {error.stderr.strip()}") from error
    return [without_secrets(item) for item in yaml.safe_load_all(done.stdout) if item]


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

    Args:
        client: Any client.
        pipeline: Name, such as `dinopipe-demo`.
    """
    namespace = client.get_user_namespace() or None
    found = client.list_pipelines(namespace=namespace, filter=display_name_filter(pipeline))
    ids = [item.pipeline_id for item in found.pipelines or () if item.display_name == pipeline]
    if not ids:
        return {}
    newest = client.list_pipeline_versions(ids[0], page_size=1, sort_by="created_at desc")
    if not newest.pipeline_versions:
        return {}
    content = newest.pipeline_versions[0].pipeline_spec
    documents = [content.get("pipeline_spec", content), content.get("platform_spec")]
    return {PIPELINE: yaml.safe_dump_all([item for item in documents if item])}
