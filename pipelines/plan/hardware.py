"""Profiles of devices and their network, and the time that a step takes on them."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import yaml
from pydantic import Field, TypeAdapter, ValidationError

from dinov2_core.config.frozen import Frozen
from dinov2_core.errors import SettingsError
from dinov2_core.planning.step import StepCost

PROFILES = Path(__file__).parents[1] / "hardware.yaml"
GIB = 2**30


class Peaks(Frozen):
    """Matrix products per second by type of the factors."""

    bfloat16: float = Field(gt=0)
    """TFLOP/s."""
    float32: float = Field(gt=0)
    """TFLOP/s."""


class Hardware(Frozen):
    """A device, its nodes and the network between them."""

    kind: Literal["cuda", "cpu"]
    """Kind of device, which decides on the kernels."""
    memory_gib: float = Field(gt=0)
    """Of one device; of one rank on CPUs."""
    reserved_gib: float = Field(ge=0)
    """Memory that no tensor holds: context, NCCL, cuBLAS, fragments of the allocator."""
    tflops: Peaks
    """Peaks of matrix products."""
    compute_fraction: float = Field(gt=0, le=1)
    """Share of the peak that matrix products reach."""
    memory_gigabytes_per_second: float = Field(gt=0)
    """Peak of the device's memory."""
    memory_fraction: float = Field(gt=0, le=1)
    """Share of that peak that all other operations reach."""
    devices_per_node: int = Field(ge=1)
    """Ranks that share the fast network."""
    intra_node_gigabytes_per_second: float = Field(gt=0)
    """Per device and direction, as a ring reaches it inside a node."""
    inter_node_gigabytes_per_second: float = Field(gt=0)
    """Per device and direction between nodes, through its own network card."""
    latency_microseconds: float = Field(ge=0)
    """Of one hop of a collective, which takes log2 of the ranks of them."""
    overlap: float = Field(ge=0, le=1)
    """Share of the computing time behind which gathers and scatters hide."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTime:
    """Duration of a step by its parts, seconds."""

    compute: float
    """Matrix products, attention, convolutions."""
    memory: float
    """Everything else, bound by the device's memory."""
    communication: float
    """All collectives."""
    exposed: float
    """Communication that computing does not hide."""

    @property
    def total(self) -> float:
        """Of the step, without waiting for data."""
        return self.compute + self.memory + self.exposed


def load_hardware(name: str) -> Hardware:
    """A profile by name, or of a file with one or more profiles (FILE or FILE:NAME).

    Raises:
        SettingsError: There is no such profile or file, or it is not right.
    """
    profiles = _profiles(PROFILES)
    if name in profiles:
        return profiles[name]
    file, _, chosen = name.partition(":")
    if not Path(file).is_file():
        raise SettingsError(
            f"--hardware {name} is neither a profile nor a file; choose one of "
            f"{', '.join(profiles)}, or a YAML file of the form of {PROFILES.name}"
        )
    own = _profiles(Path(file))
    if not chosen and len(own) == 1:
        return next(iter(own.values()))
    if chosen not in own:
        raise SettingsError(
            f"--hardware {name} leaves open which profile of {file}; choose "
            f"{' or '.join(f'{file}:{key}' for key in own)}"
        )
    return own[chosen]


def step_time(
    cost: StepCost, hardware: Hardware, *, world_size: int, num_replicas: int = 1
) -> StepTime:
    """Duration of a step: computing, elementwise work, and communication that they do not hide.

    Gathers and scatters among n ranks move (n - 1) / n of a tensor over a ring; between nodes there
    are as many rings as a node has devices, each through another network card. Reductions over all
    ranks move twice as much and are counted with one card. The share `overlap` of computing
    hides gathers and scatters; reductions, whose result is needed at once, are not hidden.
    """
    rate = {"bfloat16": hardware.tflops.bfloat16, "float32": hardware.tflops.float32}
    compute = sum(
        count / (rate.get(dtype, hardware.tflops.float32) * 1e12 * hardware.compute_fraction)
        for dtype, count in cost.flops.items()
    )
    memory = cost.moved_bytes / (
        hardware.memory_gigabytes_per_second * 1e9 * hardware.memory_fraction
    )
    shards = world_size // num_replicas
    rings = hardware.devices_per_node
    hidden = sum(
        _collective(cost, kind, hardware, ranks=shards, num_cards=rings)
        for kind in ("all_gather", "reduce_scatter")
    )
    reduced = 2 * _collective(cost, "all_reduce", hardware, ranks=world_size, num_cards=1)
    exposed = max(0.0, hidden - hardware.overlap * (compute + memory)) + reduced
    return StepTime(compute=compute, memory=memory, communication=hidden + reduced, exposed=exposed)


def _collective(
    cost: StepCost, kind: str, hardware: Hardware, *, ranks: int, num_cards: int
) -> float:
    """Seconds of all collectives of a kind.

    Args:
        cost: Cost of the step.
        kind: Collective, such as `all_gather`.
        hardware: Profile of the devices.
        ranks: Ranks that take part.
        num_cards: Network cards of each node that are busy at once, if there are several nodes.
    """
    if ranks == 1:
        return 0.0
    speed = hardware.intra_node_gigabytes_per_second
    if ranks > hardware.devices_per_node:
        speed = min(speed, num_cards * hardware.inter_node_gigabytes_per_second)
    sending = cost.sent_bytes.get(kind, 0) * (ranks - 1) / ranks / (speed * 1e9)
    return sending + cost.calls.get(kind, 0) * hardware.latency_microseconds * 1e-6 * math.log2(
        ranks
    )


def _profiles(path: Path) -> dict[str, Hardware]:
    try:
        values = json.dumps(yaml.safe_load(path.read_text(encoding="utf-8")))
        return TypeAdapter(dict[str, Hardware]).validate_json(values)
    except (yaml.YAMLError, TypeError, UnicodeDecodeError, ValidationError) as error:
        raise SettingsError(f"{path} is not a hardware profile: {error}") from error
