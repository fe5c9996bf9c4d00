from __future__ import annotations

import json
from pathlib import Path

from components.runtime.manifests import Registration
from components.runtime.outputs import write_executor_output

MANIFEST = Registration(
    uri="/data", sha256="1", config_sha256="2", mlflow_run_id="3", model_name="m", model_version=3,
    alias="champion", decision="", tracking_uri="",
)  # fmt: skip


def test_every_artifact_gets_its_metadata(tmp_path: Path) -> None:
    said = {
        "outputs": {
            "artifacts": {
                "dataset": {"artifacts": [{"name": "d", "uri": "/out/dataset"}]},
                "metrics": {"artifacts": [{"uri": "/out/metrics"}]},
            },
            "outputFile": str(tmp_path / "deep" / "output.json"),
        }
    }
    write_executor_output(json.dumps(said), manifest=MANIFEST)
    written = json.loads((tmp_path / "deep" / "output.json").read_text())["artifacts"]
    assert written["dataset"]["artifacts"][0] == {
        "name": "d",
        "uri": "/out/dataset",
        "metadata": {"uri": "/data", "sha256": "1", "config_sha256": "2", "mlflow_run_id": "3"},
    }
    assert written["metrics"]["artifacts"][0]["metadata"] == {"model_version": 3.0}


def test_outside_of_kubeflow_nothing_is_written() -> None:
    write_executor_output("", manifest=MANIFEST)
