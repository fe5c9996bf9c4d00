"""The health page of a training: one self-contained HTML file and its figures."""

from __future__ import annotations

import base64
import html
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from components.runtime.manifests import write_atomically
from components.runtime.tracking import StageRun
from components.train.job import Job
from components.train.metrics import PHASES
from dinov2_core.config.training import TrainingConfig
from dinov2_core.data.loader import PretrainLoader
from dinov2_core.data.shards import ShardReader
from dinov2_core.evaluation.figure_style import png_bytes
from dinov2_core.evaluation.health_figures import (
    Panel,
    aligned_components,
    components_figure,
    crops_figure,
    curves_figure,
)
from dinov2_core.evaluation.preprocessing import Preprocessing, denormalise
from dinov2_core.training.batches import mask_recipe

MAX_SHARE = 0.05
"""Drawing takes at most this share of the time: a checkpoint that follows too soon is left out."""
NUM_CROPPED = 4
NUM_MOMENTS = 8
"""Moments at which the patch tokens are shown; the others between the first and the last go."""
PANELS = (
    Panel(
        title="losses",
        curves={
            f"loss/{name}": name.replace("_", " ")
            for name in ("total", "dino_global", "dino_local", "ibot", "koleo")
        },
    ),
    Panel(title="teacher entropy, nats", curves={"teacher/entropy": "entropy"}),
    Panel(
        title="distinct best prototypes per cls token",
        curves={"teacher/prototype_usage": "usage"},
    ),
    Panel(title="effective rank of fixed images", curves={"teacher/effective_rank": "rank"}),
    Panel(title="nearest-neighbour probe, share right", curves={"probe/knn_top1": "top 1"}),
    Panel(
        title="gradient norms before clipping",
        curves={
            f"gradient_norm/{name}": name.replace("_", " ")
            for name in ("backbone", "dino_head", "ibot_head")
        },
        is_logarithmic=True,
    ),
    Panel(title="learning rate", curves={"schedule/learning_rate": "learning rate"}),
    Panel(
        title="images per second", curves={"speed/images_per_second": "images"}, is_from_zero=True
    ),
    Panel(
        title="where a step's time goes, seconds",
        curves={f"time/{name}": name.replace("_", " ") for name in PHASES},
        is_stacked=True,
    ),
)
_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>
body {{ font: 15px/1.5 system-ui, sans-serif; color: #22262b; max-width: 1180px;
  margin: 2rem auto; padding: 0 1rem; }}
h1 {{ font-size: 1.5rem; margin: 0; }} h2 {{ font-size: 1.1rem; margin: 2rem 0 .2rem; }}
p {{ margin: .2rem 0 .8rem; color: #5b636d; }} img {{ max-width: 100%; }}
dl {{ display: flex; flex-wrap: wrap; gap: .6rem 2.2rem; margin: 1.2rem 0; }}
dt {{ font-size: .8rem; color: #5b636d; }} dd {{ margin: 0; font-size: 1.2rem; }}
.signs {{ background: #fdf1e7; border-left: 4px solid #d55e00; padding: .6rem 1rem; }}
</style></head><body><h1>{title}</h1>
<dl>{facts}</dl>{signs}{sections}</body></html>
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """A figure of the page."""

    name: str
    """Of its PNG file, without the ending."""
    title: str
    explanation: str
    png: bytes


class HealthPage:
    """Draws the page anew whenever it is asked to; belongs to one thread.

    What cannot be drawn again later, the components of patch tokens at earlier steps, lies beside
    the figures and survives a restart.

    Args:
        job: Settings and places.
        pictured: Images whose patch tokens are pictured [n, S, S, C], uint8.
        preprocessing: How they are normalised.
    """

    def __init__(
        self, job: Job, *, pictured: NDArray[np.uint8], preprocessing: Preprocessing
    ) -> None:
        self._job = job
        self._learning: TrainingConfig = job.stage.learning
        self._pictured = pictured
        self._not_before = 0.0
        self._grid_height = preprocessing.size_pixels // self._learning.backbone.patch_size_pixels

    def refresh(
        self, run: StageRun, *, num_steps_done: int, patches: Tensor, signs: Sequence[str]
    ) -> None:
        """Write figures and page to disk and to MLflow, unless that was done a moment ago.

        Args:
            run: Of the stage.
            num_steps_done: Steps taken.
            patches: Patch tokens [n, N, D] of the pictured images.
            signs: Warnings to show.
        """
        is_last = num_steps_done == self._learning.optimization.num_steps
        started = time.monotonic()
        if started < self._not_before and not is_last:
            return
        self._draw(run, num_steps_done=num_steps_done, patches=patches, signs=signs)
        ended = time.monotonic()
        self._not_before = ended + (ended - started) / MAX_SHARE

    def _draw(
        self, run: StageRun, *, num_steps_done: int, patches: Tensor, signs: Sequence[str]
    ) -> None:
        directory = self._job.health
        directory.mkdir(parents=True, exist_ok=True)
        rows = read_rows(self._job.metrics)
        sections = (
            Section(
                name="curves",
                title="Curves",
                explanation="Over optimizer steps; where there are many, each point is a mean.",
                png=png_bytes(curves_figure(rows, panels=PANELS)),
            ),
            Section(
                name="crops",
                title="What the networks see",
                explanation="The teacher sees whole global crops; the student sees them with "
                "masks, where there is one, and all local crops.",
                png=png_bytes(self._crops(num_steps_done)),
            ),
            Section(
                name="patch_components",
                title="Patch tokens of fixed images over time",
                explanation="First three principal components of the teacher's patch tokens as "
                "colours: like colours, like features. Objects should come apart from their "
                "background as training goes on.",
                png=png_bytes(self._components(num_steps_done, patches)),
            ),
        )
        page = page_of(
            title=f"{self._job.context.run_name} · {self._job.phase}",
            facts=self._facts(rows, num_steps_done=num_steps_done),
            signs=signs,
            sections=sections,
        )
        for section in sections:
            (directory / f"{section.name}.png").write_bytes(section.png)
            run.log_picture(f"health_{section.name}.png", section.png)
        write_atomically(directory / "health.html", page)
        run.log_file(directory / "health.html", folder="")

    def _facts(
        self, rows: Sequence[tuple[int, Mapping[str, float]]], *, num_steps_done: int
    ) -> dict[str, str]:
        last: dict[str, float] = {}
        for _, row in rows:
            last |= row
        facts = {"step": f"{num_steps_done:,} of {self._learning.optimization.num_steps:,}"}
        for name, metric, form in (
            ("loss", "loss/total", "{:.3f}"),
            ("effective rank", "teacher/effective_rank", "{:.1f}"),
            ("nearest-neighbour probe", "probe/knn_top1", "{:.1%}"),
            ("images per second", "speed/images_per_second", "{:,.0f}"),
            ("skipped steps", "guards/skipped_steps", "{:.0f}"),
            ("returns to a checkpoint", "guards/rollbacks", "{:.0f}"),
        ):
            if metric in last:
                facts[name] = form.format(last[metric])
        return facts

    def _crops(self, step: int) -> Figure:
        """A few images as the loader makes them, with the masks of a small batch."""
        crops, side = self._learning.crops, self._learning.grid_side
        with ShardReader(self._job.images) as reader:
            num_images = min(NUM_CROPPED, len(reader))
            with PretrainLoader(
                reader,
                crops=crops,
                masks=mask_recipe(self._learning),
                seed=self._learning.seed,
                global_batch_size=num_images,
                rank=0,
                world_size=1,
                start_step=0,
                num_threads=1,
            ) as loader:
                batch = loader.make_batch(step)
        shown = partial(_shown, learning=self._learning)
        return crops_figure(
            global_crops=shown(batch.global_crops),
            masks=batch.masks.view(-1, side, side).numpy(),
            local_crops=shown(batch.local_crops),
            num_images=num_images,
        )

    def _components(self, step: int, patches: Tensor) -> Figure:
        """Keep the components of this step, and draw those of a few steps."""
        directory = self._job.health
        for later in _moments(directory):
            if later >= step:  # of an attempt that was left behind
                (directory / f"components_{later:08d}.npy").unlink()
        known = _moments(directory)
        kept = {at: np.load(directory / f"components_{at:08d}.npy") for at in known}
        kept[step] = aligned_components(
            patches, grid_height=self._grid_height, previous=kept[known[-1]] if known else None
        )
        np.save(directory / f"components_{step:08d}.npy", kept[step].astype(np.float32))
        moments = sorted(kept)
        positions = np.linspace(0, len(moments) - 1, min(NUM_MOMENTS, len(moments))).round()
        return components_figure(
            self._pictured, components={moments[int(i)]: kept[moments[int(i)]] for i in positions}
        )


def page_of(
    *, title: str, facts: Mapping[str, str], signs: Sequence[str], sections: Sequence[Section]
) -> str:
    """The page as HTML with its pictures inside, so that it can be passed on as one file."""
    warnings = "".join(f"<div>{html.escape(sign)}</div>" for sign in signs)
    return _PAGE.format(
        title=html.escape(title),
        facts="".join(
            f"<div><dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd></div>"
            for name, value in facts.items()
        ),
        signs=f'<div class="signs">{warnings}</div>' if signs else "",
        sections="".join(
            f"<h2>{html.escape(s.title)}</h2><p>{html.escape(s.explanation)}</p>"
            f'<img alt="{html.escape(s.title)}" '
            f'src="data:image/png;base64,{base64.b64encode(s.png).decode()}">'
            for s in sections
        ),
    )


def read_rows(metrics: Path) -> list[tuple[int, dict[str, float]]]:
    """Metrics of all steps, without values that are not finite."""
    rows = []
    with metrics.open(encoding="utf-8") as file:
        for line in file:
            step, values = json.loads(line)
            rows.append((step, {k: v for k, v in values.items() if math.isfinite(v)}))
    return rows


def _moments(directory: Path) -> list[int]:
    return sorted(int(path.stem.rpartition("_")[2]) for path in directory.glob("components_*.npy"))


def _shown(crops: Tensor, *, learning: TrainingConfig) -> NDArray[np.uint8]:
    """Crops [B, C, H, W] as pictures [B, H, W, C]."""
    recipe = learning.crops
    preprocessing = Preprocessing(
        size_pixels=recipe.global_crop_size_pixels,
        mean=recipe.mean,
        standard_deviation=recipe.standard_deviation,
    )
    return denormalise(crops, preprocessing=preprocessing)
