"""Kubeflow's executor output: how a container hands metadata and numbers to the pipeline."""

from __future__ import annotations

import json
from pathlib import Path

from components.runtime.manifests import Manifest, write_atomically


def write_executor_output(executor_input: str, *, manifest: Manifest) -> None:
    """Write the file that makes artifact metadata and metrics visible in Kubeflow.

    Without it a container's artifact outputs are lost when a pipeline runs locally.

    Args:
        executor_input: JSON that Kubeflow puts for `{{$}}`; empty outside of it.
        manifest: Its numbers become the metadata of the artifact named `metrics`, if the stage has
            one, its facts those of every other.
    """
    if not executor_input:
        return
    outputs = json.loads(executor_input)["outputs"]
    described: dict[str, object] = {}
    for name, entry in outputs.get("artifacts", {}).items():
        artifact = entry["artifacts"][0]
        metadata = manifest.numbers if name == "metrics" else _metadata(manifest)
        described[name] = {
            "artifacts": [
                {"name": artifact.get("name", name), "uri": artifact["uri"], "metadata": metadata}
            ]
        }
    write_atomically(Path(outputs["outputFile"]), json.dumps({"artifacts": described}))


def _metadata(manifest: Manifest) -> dict[str, str]:
    return {
        "uri": manifest.uri,
        "sha256": manifest.sha256,
        "config_sha256": manifest.config_sha256,
        "mlflow_run_id": manifest.mlflow_run_id,
    }
