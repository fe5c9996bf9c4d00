from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from pipelines.dinov2 import compile_pipeline
from pipelines.spec import load_spec
from tests.golden.compiled import portable_spec


def executors(folder: Path, resources: str) -> dict[str, Any]:
    path = portable_spec(folder)
    path.write_text(path.read_text() + resources)
    compile_pipeline(load_spec(path), context="{}", path=folder / "p.yaml")
    document = next(yaml.safe_load_all((folder / "p.yaml").read_text()))
    found: dict[str, Any] = document["deploymentSpec"]["executors"]
    return found


def test_resources_reach_their_task_alone(tmp_path: Path) -> None:
    found = executors(
        tmp_path, "\nresources:\n  pretrain: {cpu: '16', memory: 64Gi, num_gpus: 4}\n"
    )
    pretrain = found["exec-pretrain"]["container"]["resources"]
    assert pretrain["accelerator"]["resourceType"] == "nvidia.com/gpu"
    assert pretrain["accelerator"]["resourceCount"] == "4"
    assert pretrain["resourceMemoryRequest"] == "64Gi"
    assert "accelerator" not in found["exec-curate"]["container"]["resources"]


def test_all_tasks_run_the_image_of_the_spec(tmp_path: Path) -> None:
    digest = "registry/dinopipe@sha256:" + "a" * 64
    found = executors(tmp_path, f"\nimage: {digest}\n")
    assert {executor["container"]["image"] for executor in found.values()} == {digest}


@pytest.mark.parametrize("wrong", ["64Q", "-1Gi", "lots"])
def test_quantities_that_kubernetes_does_not_know_are_refused(wrong: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="resources.curate.memory"):
        executors(tmp_path, f"\nresources:\n  curate: {{memory: '{wrong}'}}\n")
