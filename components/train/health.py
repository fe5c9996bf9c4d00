"""The health page of a training: one self-contained HTML file and its figures."""

from __future__ import annotations

import base64
import html
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
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
from components.train.metric_history import MetricHistory
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
from dinov2_core.evaluation.labelled_set import evenly_spaced
from dinov2_core.evaluation.preprocessing import Preprocessing, denormalise
from dinov2_core.training.batches import mask_recipe

MAX_SHARE = 0.05
"""Drawing takes at most this share of the time: a checkpoint that follows too soon has no page."""
NUM_CROPPED = 4
NUM_SHOWN_STEPS = 8
"""Steps at which the patch tokens are shown: the first, the last and some between them."""
OTHER_PANELS = (
    Panel(title="teacher entropy, nats", curves={"teacher/entropy": "entropy"}),
    Panel(
        title="distinct best prototypes per cls token",
        curves={"teacher/prototype_usage": "usage"},
    ),
    Panel(title="effective rank of fixed images", curves={"teacher/effective_rank": "rank"}),
    Panel(title="nearest-neighbour probe, share correct", curves={"probe/knn_top1": "top 1"}),
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
.warnings {{ background: #fdf1e7; border-left: 4px solid #d55e00; padding: .6rem 1rem; }}
</style></head><body><h1>{title}</h1>
<dl>{facts}</dl>{warnings}{sections}</body></html>
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
    """Draws the page again at every refresh; belongs to one thread.

    What cannot be drawn again later, the components of patch tokens at earlier steps, lies beside
    the figures and survives a restart.

    Args:
        job: Settings and paths.
        images: Images whose patch tokens are shown [n, S, S, C], uint8.
        preprocessing: How they are normalised.
    """

    def __init__(
        self, job: Job, *, images: NDArray[np.uint8], preprocessing: Preprocessing
    ) -> None:
        self._job = job
        self._learning: TrainingConfig = job.stage.learning
        self._images = images
        self._history = MetricHistory(job.metrics)
        self._not_before = 0.0
        self._grid_height = preprocessing.size_pixels // self._learning.backbone.patch_size_pixels

    def refresh(
        self,
        *,
        upload: Callable[[str, Callable[[StageRun], None]], None],
        num_steps_done: int,
        patch_tokens: Tensor,
        warnings: Sequence[str],
    ) -> None:
        """Write figures and page to the disk, unless that was done a moment ago.

        Args:
            upload: Given the name of every figure and of the page, and what logs it to MLflow.
            num_steps_done: Steps taken.
            patch_tokens: Of the images [n, N, D].
            warnings: To show.
        """
        is_last = num_steps_done == self._learning.optimization.num_steps
        started = time.monotonic()
        if started < self._not_before and not is_last:
            return
        directory = self._job.health
        directory.mkdir(parents=True, exist_ok=True)
        self._history.refresh()
        sections = self._sections(num_steps_done, patch_tokens)
        page = page_of(
            title=f"{self._job.context.run_name} · {self._job.stage_name}",
            facts=self._facts(num_steps_done=num_steps_done),
            warnings=warnings,
            sections=sections,
        )
        for section in sections:
            (directory / f"{section.name}.png").write_bytes(section.png)
            name = f"health_{section.name}.png"
            upload(name, partial(StageRun.log_picture, name=name, png=section.png))
        path = directory / "health.html"
        write_atomically(path, page)
        upload(path.name, lambda run: run.log_file(path, folder=""))
        ended = time.monotonic()
        self._not_before = ended + (ended - started) / MAX_SHARE

    def _sections(self, num_steps_done: int, patch_tokens: Tensor) -> tuple[Section, ...]:
        return (
            Section(
                name="curves",
                title="Curves",
                explanation="Over optimizer steps; where there are many, each point is a mean.",
                png=png_bytes(self._curves()),
            ),
            Section(
                name="crops",
                title="Crops",
                explanation="The teacher gets whole global crops; the student gets them with "
                "masks, where there is one, and all local crops.",
                png=png_bytes(self._crops(num_steps_done)),
            ),
            Section(
                name="patch_components",
                title="Patch tokens of fixed images over time",
                explanation="First three principal components of the teacher's patch tokens as "
                "colours: like colours, like features. Objects should come apart from their "
                "background as training goes on.",
                png=png_bytes(self._components(num_steps_done, patch_tokens)),
            ),
        )

    def _curves(self) -> Figure:
        panels = (loss_panel(self._history.latest), *OTHER_PANELS)
        return curves_figure(self._history.rows(), panels=panels)

    def _facts(self, *, num_steps_done: int) -> dict[str, str]:
        latest = self._history.latest
        facts = {"step": f"{num_steps_done:,} of {self._learning.optimization.num_steps:,}"}
        for name, metric, form in (
            ("loss", "loss/total", "{:.3f}"),
            ("effective rank", "teacher/effective_rank", "{:.1f}"),
            ("nearest-neighbour probe", "probe/knn_top1", "{:.1%}"),
            ("images per second", "speed/images_per_second", "{:,.0f}"),
            ("skipped steps", "guards/skipped_steps", "{:.0f}"),
            ("returns to a checkpoint", "guards/rollbacks", "{:.0f}"),
        ):
            if metric in latest:
                facts[name] = form.format(latest[metric])
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

    def _components(self, step: int, patch_tokens: Tensor) -> Figure:
        """Keep the components of this step, and draw those of a few steps."""
        directory = self._job.health
        for later in _kept_steps(directory):
            if later >= step:  # of an attempt that was left behind
                _components_file(directory, later).unlink()
        known = _kept_steps(directory)
        previous = np.load(_components_file(directory, known[-1])) if known else None
        components = aligned_components(
            patch_tokens, grid_height=self._grid_height, previous=previous
        )
        np.save(_components_file(directory, step), components.astype(np.float32))
        steps = [*known, step]
        return components_figure(
            self._images,
            components={
                steps[i]: np.load(_components_file(directory, steps[i]))
                for i in evenly_spaced(len(steps), NUM_SHOWN_STEPS)
            },
        )


def loss_panel(metrics: Iterable[str]) -> Panel:
    """Curves of the total and of every loss term among the metrics."""
    names = [name.removeprefix("loss/") for name in metrics if name.startswith("loss/")]
    return Panel(title="losses", curves={f"loss/{n}": n.replace("_", " ") for n in names})


def page_of(
    *, title: str, facts: Mapping[str, str], warnings: Sequence[str], sections: Sequence[Section]
) -> str:
    """The page as HTML with its figures inside, so that it can be passed on as one file."""
    boxes = "".join(f"<div>{html.escape(warning)}</div>" for warning in warnings)
    return _PAGE.format(
        title=html.escape(title),
        facts="".join(
            f"<div><dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd></div>"
            for name, value in facts.items()
        ),
        warnings=f'<div class="warnings">{boxes}</div>' if warnings else "",
        sections="".join(
            f"<h2>{html.escape(s.title)}</h2><p>{html.escape(s.explanation)}</p>"
            f'<img alt="{html.escape(s.title)}" '
            f'src="data:image/png;base64,{base64.b64encode(s.png).decode()}">'
            for s in sections
        ),
    )


def _kept_steps(directory: Path) -> list[int]:
    return sorted(int(path.stem.rpartition("_")[2]) for path in directory.glob("components_*.npy"))


def _components_file(directory: Path, step: int) -> Path:
    return directory / f"components_{step:08d}.npy"


def _shown(crops: Tensor, *, learning: TrainingConfig) -> NDArray[np.uint8]:
    """Crops [B, C, H, W] as pictures [B, H, W, C]."""
    recipe = learning.crops
    preprocessing = Preprocessing(
        size_pixels=recipe.global_crop_size_pixels,
        mean=recipe.mean,
        standard_deviation=recipe.standard_deviation,
    )
    return denormalise(crops, preprocessing=preprocessing)
