"""A plan as tables, and as JSON for programs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict

from rich.markup import escape
from rich.table import Table

from components.runtime.progress import duration
from pipelines.plan.alternatives import Proposal
from pipelines.plan.estimate import ScalingRow, StagePlan
from pipelines.plan.hardware import GIB

CAPTION = (
    "Counted as plain operations, crop group by crop group: compiled blocks and packed attention, "
    "which save memory traffic, are in no number but the shares of the peaks in hardware.yaml."
)
"""Caption of the table."""


def plan_table(plans: Sequence[StagePlan], *, hardware: str, price: float) -> Table:
    """One column per training stage."""
    title = f"plan on {escape(hardware)}"
    table = Table(
        title=title,
        header_style="bold",
        title_justify="left",
        caption=CAPTION,
        caption_justify="left",
    )
    table.add_column("per stage")
    for plan in plans:
        table.add_column(plan.stage, justify="right")
    for heading in _rows(plans[0], price=price):
        table.add_row(heading, *(_rows(plan, price=price)[heading] for plan in plans))
    return table


def _rows(plan: StagePlan, *, price: float) -> dict[str, str]:
    purposes = sorted(plan.cost.memory_bytes.items(), key=lambda item: -item[1])
    largest = "\n".join(f"{name} {size / GIB:.2f}" for name, size in purposes)
    heads = sum(count for name, count in plan.parameters.items() if name != "backbone")
    step, note = plan.step, "" if plan.fits else " [red]does not fit[/]"
    flops = sum(plan.cost.flops.values()) * plan.ranks
    rows = {
        "parameters": f"{plan.parameters['backbone'] / 1e6:.1f} M + heads {heads / 1e6:.1f} M",
        "ranks x images": f"{plan.ranks} x {plan.images_per_rank}",
        "tokens per step": f"{plan.tokens_per_step / 1e6:.2f} M",
        "FLOPs per step": f"{flops / 1e12:,.1f} T",
        "memory per rank": f"{plan.peak_gib:.1f} of {plan.memory_gib:.0f} GiB{note}",
        "  at the peak, GiB": largest,
        "step": f"{step.total:.3f} s",
        "  products / memory / waiting": f"{step.compute:.3f} / {step.memory:.3f} / "
        f"{step.exposed:.3f} s",
        "steps": f"{plan.num_steps:,}",
        "duration": duration(step.total * plan.num_steps),
        "GPU-hours": f"{plan.gpu_hours:,.1f}",
        "checkpoint": f"{plan.checkpoint_gib:.2f} GiB, {plan.kept_gib:.1f} kept",
        "images read": f"{plan.read_gib:,.1f} GiB",
    }
    return rows | {"cost": f"{plan.price:,.2f}"} if price else rows


def proposals_table(proposals: Sequence[Proposal], *, stage: str) -> Table:
    """Changes of which each makes a stage fit."""
    table = Table(title=f"{stage} does not fit; any of these changes would", title_justify="left")
    for heading in ("change", "GiB", "step"):
        table.add_column(heading)
    for item in proposals:
        table.add_row(escape(item.change), f"{item.peak_gib:.1f}", f"{item.step_seconds:.3f} s")
    if not proposals:
        table.add_row(
            "devices with more memory: recomputation, smaller parts and more ranks do not"
        )
    return table


def scaling_table(rows: Sequence[ScalingRow], *, stage: str, memory_gib: float) -> Table:
    """The same global batch on other numbers of ranks; what does not fit is marked."""
    table = Table(title=f"{stage} on more ranks, the same global batch", title_justify="left")
    for heading in ("ranks", "images", "GiB", "step", "waiting", "efficiency", "GPU-hours"):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            f"{row.ranks:,}",
            str(row.images_per_rank),
            f"{row.peak_gib:.1f}" + (" [red]no[/]" if row.peak_gib > memory_gib else ""),
            f"{row.step.total:.3f} s",
            f"{row.step.exposed:.3f} s",
            f"{row.efficiency:.0%}",
            f"{row.gpu_hours:,.0f}",
        )
    return table


def plan_json(plans: Sequence[StagePlan]) -> str:
    """The numbers of the tables in full; the names have the units."""
    stages = {
        plan.stage: asdict(plan) | {"fits": plan.fits, "step_seconds": plan.step.total}
        for plan in plans
    }
    return json.dumps(stages, indent=2)
