"""The files of a plan: pipeline, jobs and manifests, and how they differ from others."""

from __future__ import annotations

import difflib
import json
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from dinov2_core.errors import InputError
from pipelines.cluster.submit import Target, compile_for, display_name_filter
from pipelines.plan.jobs import PHASES, planned_job
from pipelines.spec.pipeline_spec import PipelineSpec

if TYPE_CHECKING:
    import kfp

PIPELINE = "pipeline.yaml"

Object = dict[str, Any]
Files = dict[str, str]


def render(spec: PipelineSpec, target: Target, *, manifests: Sequence[Object] = ()) -> Files:
    """The compiled pipeline, the job of each stage that has one, and manifests.

    Args:
        spec: Checked spec.
        target: Work directory, volume and account on the cluster.
        manifests: What kustomize builds; may be empty.

    Returns:
        Text by file name.

    Raises:
        SettingsError: The spec's tracking server cannot be named in a manifest, or is missing.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / PIPELINE
        compile_for(spec, target, path=path)
        files = {path.name: path.read_text(encoding="utf-8")}
    for phase in PHASES:
        job = planned_job(phase, spec, target)
        if job is not None:
            files[f"{phase}-trainjobs.yaml"] = yaml.safe_dump(job, sort_keys=False)
    if manifests:
        files["manifests.yaml"] = yaml.safe_dump_all(manifests, sort_keys=False)
    return files


def differences(deployed: Mapping[str, str], planned: Mapping[str, str]) -> str:
    """Unified diff of every file, empty where nothing changes.

    JSON inside the files is laid out line by line and compiler versions are left out, so that a
    changed setting shows as one line.

    Args:
        deployed: Text by file name.
        planned: The same.

    Raises:
        InputError: A deployed file is not YAML.
    """
    parts = []
    for name in sorted({*deployed, *planned}):
        if name not in deployed or name not in planned:
            is_new = name in planned
            count = len((planned if is_new else deployed)[name].splitlines())
            parts.append(f"{name} is {'new' if is_new else 'not there any more'}, {count} lines")
            continue
        old, new = (_readable(files[name], name) for files in (deployed, planned))
        parts += difflib.unified_diff(
            old, new, f"deployed/{name}", f"planned/{name}", lineterm="", n=2
        )
    return "\n".join(parts)


def _readable(text: str, name: str) -> list[str]:
    try:
        documents = [_with_parsed_json(item) for item in yaml.safe_load_all(text) if item]
    except yaml.YAMLError as error:
        raise InputError(f"{name} of the earlier plan is not YAML: {error}") from error
    return yaml.safe_dump_all(documents, sort_keys=True, width=100).splitlines()


def _with_parsed_json(value: object) -> object:
    """The same with strings that hold a JSON object replaced by the object."""
    match value:
        case dict():
            return {
                key: _with_parsed_json(item) for key, item in value.items() if key != "sdkVersion"
            }
        case list():
            return [_with_parsed_json(item) for item in value]
        case str() if re.match(r"\s*\{.*\}\s*$", value, re.DOTALL):
            try:
                return _with_parsed_json(json.loads(value))
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
