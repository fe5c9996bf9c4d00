"""Changes of a spec with which a stage would fit its devices, each of them planned."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

from pydantic import ValidationError

from components.train.config import TrainStage
from k8s.launchers import Processes
from pipelines.plan.cost import cost_and_time, peak_gib
from pipelines.plan.hardware import Hardware
from pipelines.spec.pipeline_spec import PipelineSpec

RECOMPUTATION = "pretrain.learning.execution.recomputes_activations"
ACCUMULATION = "pretrain.learning.optimization.accumulation_steps"
REPLICAS = "pretrain.topology.num_replicas"
NODES = "pretrain.topology.num_nodes"
PROCESSES = "pretrain.topology.processes_per_node"
GPUS = ("resources.pretrain.num_gpus", "resources.finetune.num_gpus")
LEVELS = ("none", "selective", "full")
"""Of recomputation."""
FACTORS = (2, 4, 8, 16, 32)

Settings = Mapping[str, Any]
"""Values by dotted path of a spec."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Proposal:
    """Settings with which a stage fits, planned like the stage itself."""

    settings: Settings
    """What to change in the spec."""
    peak_gib: float
    """Memory of one rank, with what is reserved."""
    step_seconds: float
    """Duration of a step."""

    @property
    def change(self) -> str:
        """The settings as text for a table."""
        return ", ".join(f"{path}: {_as_yaml(value)}" for path, value in self.settings.items())


def proposals(spec: PipelineSpec, name: str, hardware: Hardware) -> tuple[Proposal, ...]:
    """The least change of each kind that makes a stage fit; none where no change does.

    Tried are recomputing more, smaller parts of the batch, both, fewer replicas, and more ranks,
    each until a spec is valid and its plan fits.

    Args:
        spec: Checked spec, whose stage does not fit.
        name: `pretrain` or `finetune`; the settings of both are those of `pretrain`.
        hardware: Profile of the devices.
    """

    def first(options: Iterable[Settings]) -> list[Proposal]:
        planned = (_planned(settings, spec, name, hardware) for settings in options)
        return list(islice((proposal for proposal in planned if proposal is not None), 1))

    smaller = list(_smaller_parts(spec, name))
    found = [*first(_more_recomputation(spec)), *first(smaller)]
    if not found:
        found = first({RECOMPUTATION: LEVELS[-1], **part} for part in smaller)
    return (*found, *first(_fewer_replicas(spec)), *first(_more_ranks(spec, hardware)))


def with_settings(spec: PipelineSpec, settings: Settings) -> PipelineSpec:
    """The spec with some values changed.

    Raises:
        pydantic.ValidationError: It would not be valid.
    """
    values = json.loads(spec.model_dump_json())
    for path, value in settings.items():
        *parents, last = path.split(".")
        section = values
        for key in parents:
            section = section[key]
        section[last] = value
    return PipelineSpec.model_validate_json(json.dumps(values))


def _planned(
    settings: Settings, spec: PipelineSpec, name: str, hardware: Hardware
) -> Proposal | None:
    """The proposal of some settings; None where they are not valid, or the stage does not fit."""
    try:
        changed = with_settings(spec, settings)
    except ValidationError:
        return None
    cost, step = cost_and_time(stage_of(changed, name), hardware)
    peak = peak_gib(cost, hardware)
    if peak > hardware.memory_gib:
        return None
    return Proposal(settings=settings, peak_gib=peak, step_seconds=step.total)


def stage_of(spec: PipelineSpec, name: str) -> TrainStage:
    """One of the two training stages."""
    return spec.pretrain_stage if name == "pretrain" else spec.finetune_stage


def _more_recomputation(spec: PipelineSpec) -> list[Settings]:
    level = LEVELS.index(spec.pretrain.learning.execution.recomputes_activations)
    return [{RECOMPUTATION: more} for more in LEVELS[level + 1 :]]


def _smaller_parts(spec: PipelineSpec, name: str) -> list[Settings]:
    """Batches in more parts, as long as a part has an image of each rank."""
    stage = stage_of(spec, name)
    optimization = stage.learning.optimization
    parts = optimization.accumulation_steps
    images = optimization.global_batch_size // stage.topology.world_size
    return [{ACCUMULATION: parts * n} for n in FACTORS if images % (parts * n) == 0]


def _fewer_replicas(spec: PipelineSpec) -> list[Settings]:
    replicas = spec.pretrain.topology.num_replicas
    return [{REPLICAS: n} for n in range(replicas - 1, 0, -1) if replicas % n == 0]


def _more_ranks(spec: PipelineSpec, hardware: Hardware) -> Iterator[Settings]:
    """More processes until nodes are full, then more nodes, which need another launcher."""
    topology = spec.pretrain.topology
    for n in FACTORS:
        ranks = topology.processes_per_node * n
        if ranks <= hardware.devices_per_node:
            has_gpus = spec.resources.pretrain.num_gpus > 0
            yield {PROCESSES: ranks, **(dict.fromkeys(GPUS, ranks) if has_gpus else {})}
    for n in FACTORS:
        yield {NODES: topology.num_nodes * n, **_launcher_for_nodes(spec)}


def _launcher_for_nodes(spec: PipelineSpec) -> Settings:
    if not isinstance(spec.placement.launcher, Processes):
        return {}
    launcher: Settings = {"placement.launcher": {"kind": "trainjob"}}
    by_digest = {} if "@sha256:" in spec.image else {"image": f"{spec.image}@sha256:DIGEST"}
    return {**launcher, **by_digest}


def _as_yaml(value: object) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_as_yaml(item)}" for key, item in value.items()) + "}"
    return str(value)
