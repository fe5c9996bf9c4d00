from __future__ import annotations

from pathlib import Path

import pytest

from pipelines.spec.pipeline_spec import load_spec
from pipelines.spec.placement import Resources, without_gpus
from pipelines.spec.problems import SpecError
from tests.golden.compiled import portable_spec


def refused(folder: Path, addition: str) -> str:
    """The problems of a spec with an addition."""
    path = portable_spec(folder)
    path.write_text(f"{path.read_text()}\n{addition}\n")
    with pytest.raises(SpecError) as caught:
        load_spec(path)
    return str(caught.value)


@pytest.mark.parametrize("wrong", ["64Q", "-1Gi", "lots"])
def test_quantities_that_kubernetes_does_not_know_are_refused(wrong: str, tmp_path: Path) -> None:
    text = refused(tmp_path, f"resources: {{curate: {{memory: '{wrong}'}}}}")
    assert "resources.curate.memory" in text


def test_waits_do_not_grow_by_fractions(tmp_path: Path) -> None:
    text = refused(tmp_path, "placement: {retries: {factor: 1.5}}")
    assert "placement.retries.factor" in text


@pytest.mark.parametrize("accelerator", ["nvidia.com/gpux", "gpu"])
def test_an_unknown_accelerator_is_refused(accelerator: str, tmp_path: Path) -> None:
    text = refused(tmp_path, f"resources: {{pretrain: {{accelerator: {accelerator}}}}}")
    assert "resources.pretrain.accelerator" in text


def test_a_task_without_its_ranks_keeps_processors_and_memory() -> None:
    resources = Resources(cpu="8", memory="32Gi", num_gpus=4)
    assert without_gpus(resources) == Resources(cpu="8", memory="32Gi")


@pytest.mark.parametrize(
    ("placement", "reason"),
    [
        ("{rdma: {}}", "placement: rdma has no effect with launcher processes"),
        ("{topology: {level: rack}}", "placement: topology has no effect with launcher processes"),
        ("{launcher: {kind: trainjob}}", "image: 'dinopipe:0.1.0' has no digest"),
        ("{launcher: {kind: mpi}}", "placement.launcher"),
        ("{retries: {count: -1}}", "placement.retries.count"),
        ("{deadlines: {step_seconds: -5}}", "placement.deadlines.step_seconds"),
        ("{queue: Q}", "placement.queue: 'Q' is not a DNS label"),
        ("{tolerations: [{operator: Bogus}]}", "placement.tolerations.0.operator"),
        (
            "{queue: q, launcher: {kind: trainjob, on_stop: suspend}}",
            "on_stop suspend does not last in queue q",
        ),
        (
            "{launcher: {kind: pytorchjob, max_restarts: 3}}",
            "placement.launcher: kind pytorchjob is no longer supported, because Kubeflow's "
            "training operator v1 is deprecated; install Kubeflow Trainer v2 and set kind to "
            "trainjob",
        ),
    ],
)
def test_a_placement_that_kubeflow_would_take_silently_is_refused(
    placement: str, reason: str, tmp_path: Path
) -> None:
    assert reason in refused(tmp_path, f"placement: {placement}")
