"""plan_proposals: what is proposed is planned once more, as a spec of its own, and fits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipelines.plan.alternatives import (
    ACCUMULATION,
    GPUS,
    NODES,
    PROCESSES,
    RECOMPUTATION,
    REPLICAS,
    Proposal,
    proposals,
    stage_of,
    with_settings,
)
from pipelines.plan.cost import cost_and_time, peak_gib
from pipelines.plan.hardware import Hardware, load_hardware
from pipelines.spec.pipeline_spec import PipelineSpec, load_spec
from tests.pipelines.specs import small_values, write_spec

PAIRS = load_hardware("h100").model_copy(update={"reserved_gib": 0.0, "devices_per_node": 2})
"""Two devices in each node."""
IMAGE = f"registry.example/dinopipe@sha256:{'a' * 64}"
KINDS = (RECOMPUTATION, ACCUMULATION, REPLICAS, PROCESSES, NODES)


def a_spec(folder: Path, *, prototypes: int = 64, **changes: Any) -> PipelineSpec:
    """Four images a step; with many prototypes, parameters are most of its memory."""
    values = small_values("s3://bucket/pile", **changes)
    learning = values["pretrain"]["learning"]
    learning["optimization"]["global_batch_size"] = 4
    values["finetune"]["global_batch_size"] = 4
    for part in ("dino", "ibot"):
        learning[part]["head"]["num_prototypes"] = prototypes
    return load_spec(write_spec(values, folder / "spec.yaml"))


def with_memory(gib: float, **changes: int) -> Hardware:
    return PAIRS.model_copy(update={"memory_gib": gib, **changes})


def planned(spec: PipelineSpec, settings: dict[str, Any], stage: str = "pretrain") -> float:
    """Memory of a rank of the spec with other settings, as the planner has it."""
    cost, _ = cost_and_time(stage_of(with_settings(spec, settings), stage), PAIRS)
    return peak_gib(cost, PAIRS)


def kinds(found: tuple[Proposal, ...]) -> list[set[str]]:
    """Which settings each proposal changes."""
    return [set(item.settings) & set(KINDS) for item in found]


def check(found: tuple[Proposal, ...], spec: PipelineSpec, hardware: Hardware, stage: str) -> None:
    """Every proposal is a valid spec whose own plan fits and says the same."""
    assert found
    for item in found:
        changed = stage_of(with_settings(spec, item.settings), stage)
        cost, time = cost_and_time(changed, hardware)
        assert peak_gib(cost, hardware) == item.peak_gib <= hardware.memory_gib
        assert time.total == item.step_seconds


@pytest.mark.parametrize(
    "setting",
    [{RECOMPUTATION: "full"}, {ACCUMULATION: 2}, {ACCUMULATION: 4}, {PROCESSES: 2}, {NODES: 4}],
    ids=str,
)
def test_a_change_of_each_kind_is_proposed_where_it_fits(
    setting: dict[str, Any], tmp_path: Path
) -> None:
    """With just the memory that the stage takes with the change."""
    spec = a_spec(tmp_path, image=IMAGE, placement={"launcher": {"kind": "trainjob"}})
    memory = planned(spec, setting)
    assert memory < planned(spec, {})
    small = with_memory(memory)
    found = proposals(spec, "pretrain", small)
    check(found, spec, small, "pretrain")
    assert any(setting.items() <= item.settings.items() for item in found)


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_fewer_replicas_are_proposed_where_parameters_are_most_of_the_memory(
    stage: str, tmp_path: Path
) -> None:
    topology = {"processes_per_node": 2, "num_replicas": 2}
    spec = a_spec(tmp_path, prototypes=32768, pretrain__topology=topology)
    memory = planned(spec, {REPLICAS: 1}, stage)
    assert memory < 0.8 * planned(spec, {}, stage)
    small = with_memory(memory)
    found = proposals(spec, stage, small)
    check(found, spec, small, stage)
    assert {REPLICAS} in kinds(found)


def test_both_together_are_proposed_where_neither_does(tmp_path: Path) -> None:
    spec = a_spec(tmp_path)
    alone = min(planned(spec, each) for each in ({RECOMPUTATION: "full"}, {ACCUMULATION: 4}))
    both = planned(spec, {RECOMPUTATION: "full", ACCUMULATION: 4})
    assert both < alone
    small = with_memory(both, devices_per_node=1)
    found = proposals(spec, "pretrain", small)
    check(found, spec, small, "pretrain")
    assert kinds(found)[0] == {RECOMPUTATION, ACCUMULATION}


def test_nothing_is_proposed_where_nothing_does(tmp_path: Path) -> None:
    assert proposals(a_spec(tmp_path), "pretrain", with_memory(1e-6)) == ()


def test_only_valid_specs_are_proposed(tmp_path: Path) -> None:
    """Four images of pretraining can be divided, three of the other stage cannot."""
    values = a_spec(tmp_path).model_dump(mode="json")
    values["finetune"]["global_batch_size"] = 3
    spec = load_spec(write_spec(values, tmp_path / "spec.yaml"))
    assert kinds(proposals(spec, "pretrain", with_memory(1e3))) == [{RECOMPUTATION}]


def test_more_nodes_come_with_a_launcher_and_more_ranks_with_their_gpus(tmp_path: Path) -> None:
    spec = a_spec(tmp_path, resources={"pretrain": {"num_gpus": 1}, "finetune": {"num_gpus": 1}})
    filled = proposals(spec, "pretrain", with_memory(1e3))[-1]
    assert [filled.settings[path] for path in (PROCESSES, *GPUS)] == [2, 2, 2]
    more = proposals(spec, "pretrain", with_memory(1e3, devices_per_node=1))[-1]
    assert more.settings["placement.launcher"] == {"kind": "trainjob"}
    assert "image: dinopipe:0.1.0@sha256:DIGEST" in more.change
