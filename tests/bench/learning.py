"""Does it learn? Pretrains on real images and classifies others: `make bench-learning`.

Nearest neighbours of the teacher's cls token, 5,000 labelled images and 20 neighbours, beside raw
pixels on the same images. The recipe is pipelines/specs/small_images.yaml.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import pipelines
from components.runtime.image_sources.labelled import read_labelled_pair
from components.runtime.processes import COMPUTING
from dinov2_core.config.training import TrainingConfig
from dinov2_core.data.shards import ShardWriter
from dinov2_core.distributed.mesh import process_group
from dinov2_core.evaluation.knn import knn_accuracies
from dinov2_core.evaluation.labelled_set import LabelledSet
from dinov2_core.evaluation.preprocessing import Preprocessing, preprocessed_batches
from dinov2_core.training.loop import TrainingRun
from pipelines.spec.pipeline_spec import PipelineSpec, load_spec

FOLDER = Path(pipelines.__file__).parent
RECIPE = FOLDER / "specs" / "small_images.yaml"
NUM_LABELLED, NUM_NEIGHBOURS, BATCH_SIZE = 5000, 20, 250
BAR = 0.794
"""What raw pixels reach with so many labels and neighbours."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """Labelled images and those to classify."""

    train: LabelledSet
    test: LabelledSet
    preprocessing: Preprocessing

    @classmethod
    def of(cls, learning: TrainingConfig) -> Question:
        """The demo's images, every second of the train images labelled."""
        pair = read_labelled_pair(
            train=f"{FOLDER}/demo/fashion_mnist_train.parquet",
            test=f"{FOLDER}/demo/fashion_mnist_test.parquet",
        )
        crops = learning.crops
        step = len(pair.train) // NUM_LABELLED
        return cls(
            train=pair.train.subset(list(range(0, NUM_LABELLED * step, step))),
            test=pair.test,
            preprocessing=Preprocessing(
                size_pixels=crops.global_crop_size_pixels,
                mean=crops.mean,
                standard_deviation=crops.standard_deviation,
            ),
        )

    def answered_by_pixels(self, *, is_raw: bool) -> float:
        """Share classified rightly by pixels: raw ones in [0, 1], or as the network sees them."""
        seen = [torch.cat(self._batches(images)).flatten(2) for images in self._sets]
        if is_raw:
            mean = torch.tensor(self.preprocessing.mean)[:, None]
            deviation = torch.tensor(self.preprocessing.standard_deviation)[:, None]
            seen = [pixels * deviation + mean for pixels in seen]
        return self._top1(*(pixels.flatten(1) for pixels in seen))

    def answered_by(self, run: TrainingRun) -> float:
        """Share classified rightly by the teacher's cls token."""
        features = [
            torch.cat([run.teacher_features(batch).cls.float() for batch in self._batches(images)])
            for images in self._sets
        ]
        return self._top1(*features)

    @property
    def _sets(self) -> tuple[LabelledSet, LabelledSet]:
        return self.train, self.test

    def _batches(self, images: LabelledSet) -> list[Tensor]:
        return list(
            preprocessed_batches(
                images.images, preprocessing=self.preprocessing, batch_size=BATCH_SIZE
            )
        )

    def _top1(self, train: Tensor, test: Tensor) -> float:
        accuracies = knn_accuracies(
            train_features=train,
            train_labels=torch.from_numpy(self.train.labels),
            test_features=test,
            test_labels=torch.from_numpy(self.test.labels),
            num_neighbours=(NUM_NEIGHBOURS,),
        )
        return accuracies[NUM_NEIGHBOURS]


def main(argv: Sequence[str] | None = None) -> int:
    """Train, tell top-1 four times, write a file; 1 when pixels are better or nothing rises."""
    parser = argparse.ArgumentParser(description="Learning benchmark.")
    parser.add_argument("--recipe", type=Path, default=RECIPE)
    parser.add_argument("-o", "--output", type=Path, default=Path("bench-learning.json"))
    parser.add_argument("--num-threads", type=int, default=2)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.num_threads)
    spec = load_spec(args.recipe)
    question = Question.of(spec.pretrain.learning)
    pixels = question.answered_by_pixels(is_raw=True)
    standardised = question.answered_by_pixels(is_raw=False)
    started = time.monotonic()
    top1 = learn(spec, question=question)
    first, *_, last = top1.values()
    holds = last > max(pixels, standardised, BAR) and last > first
    result = {
        "seed": spec.pretrain.learning.seed,
        "num_steps": spec.pretrain.learning.optimization.num_steps,
        "top1_of_raw_pixels": pixels,
        "top1_of_standardised_pixels": standardised,
        "top1_at_step": top1,
        "minutes": (time.monotonic() - started) / 60,
        "holds": holds,
    }
    args.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    say(
        f"{'holds' if holds else 'MISSED'}: {first:.1%} -> {last:.1%}, raw pixels {pixels:.1%}, "
        f"standardised {standardised:.1%}"
    )
    return 0 if holds else 1


def compute_as_stages_do() -> None:
    """Start this program again in the environment that a local run gives its stages."""
    environment = COMPUTING | os.environ
    if environment != os.environ:
        os.execve(
            sys.executable,
            [sys.executable, "-m", "tests.bench.learning", *sys.argv[1:]],
            environment,
        )


def learn(spec: PipelineSpec, *, question: Question) -> dict[int, float]:
    """Top-1 at every quarter of the training."""
    learning = spec.pretrain.learning
    num_steps, top1 = learning.optimization.num_steps, {}
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, process_group() as ranks:
        shards = Path(folder) / "shards"
        write_shards(shards)
        checkpoints = Path(folder) / "checkpoints"
        run = TrainingRun(learning, ranks=ranks, checkpoints=checkpoints, starting_weights=None)
        for report in run.steps(shards=shards, loader_threads=1):
            step = report.step + 1
            if step % (num_steps // 4) == 0:
                top1[step] = question.answered_by(run)
                left = (time.monotonic() - started) / step * (num_steps - step)
                say(f"step {step} of {num_steps}: top-1 {top1[step]:.1%}, {left / 60:.0f} min left")
    return top1


def write_shards(directory: Path) -> None:
    """All images of the demo's train set, unlabelled."""
    images = read_labelled_pair(
        train=f"{FOLDER}/demo/fashion_mnist_train.parquet",
        test=f"{FOLDER}/demo/fashion_mnist_test.parquet",
    ).train.images
    with ShardWriter(directory, target_size_bytes=1 << 22) as writer:
        for image in images:
            writer.add(image.read(), extension="png", width=28, height=28)


def say(line: str) -> None:
    """At once, whatever the output is."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    compute_as_stages_do()
    sys.exit(main())
