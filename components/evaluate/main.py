"""Measures a teacher's features beside baselines and draws them."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from components.evaluate.config import EvaluateStage, EvaluationSet
from components.evaluate.evaluation import Evaluation
from components.runtime.image_sources.labelled import read_labelled_pair
from components.runtime.image_sources.opening import open_source
from components.runtime.image_sources.source import content_digest
from components.runtime.manifests import (
    CheckpointManifest,
    DatasetManifest,
    EvaluationReport,
    digest_of,
    digest_of_file,
)
from components.runtime.stage import Stage, StageContext, run_stage, stage_parser
from dinov2_core.data.shards import ShardReader
from dinov2_core.errors import InputError
from dinov2_core.evaluation.labelled_set import LabelledPair
from dinov2_core.evaluation.teacher import load_teacher

NUM_DIGEST_THREADS = 4


def main(argv: Sequence[str] | None = None) -> int:
    """Run the stage; its flags are those of the component."""
    parser = stage_parser("Measure a teacher's features.", "dataset", "checkpoint")
    return run_stage("evaluate", args=parser.parse_args(argv), prepare=_stage)


def _stage(args: argparse.Namespace) -> Stage[EvaluationReport]:
    config = EvaluateStage.model_validate_json(args.config)
    dataset = DatasetManifest.read(args.dataset)
    checkpoint = CheckpointManifest.read(args.checkpoint)
    evaluation_sha256 = digest_of(
        {
            "sets": [
                {"name": one.name, "train": _content(one.train), "test": _content(one.test)}
                for one in config.sets
            ],
            "settings": config.settings.model_dump(mode="json"),
        }
    )

    def work(stage: StageContext) -> EvaluationReport:
        return _evaluate(
            config,
            dataset=dataset,
            checkpoint=checkpoint,
            evaluation_sha256=evaluation_sha256,
            stage=stage,
        )

    return Stage(
        manifest_type=EvaluationReport,
        settings=config,
        identity={"evaluation": evaluation_sha256},
        parents=(dataset, checkpoint),
        work=work,
    )


def _content(uri: str) -> object:
    """Identifies a labelled set by what it holds, wherever it lies."""
    path = Path(uri)
    if path.is_file():
        return digest_of_file(path)
    source = open_source(uri)
    items = sorted(source.objects(), key=lambda item: item.key.split("/"))
    with ThreadPoolExecutor(NUM_DIGEST_THREADS) as pool:
        contents = pool.map(partial(content_digest, source), items)
        return [(item.key, content) for item, content in zip(items, contents, strict=True)]


def _evaluate(
    config: EvaluateStage,
    *,
    dataset: DatasetManifest,
    checkpoint: CheckpointManifest,
    evaluation_sha256: str,
    stage: StageContext,
) -> EvaluationReport:
    described = checkpoint.teacher
    evaluation = Evaluation(
        load_teacher(
            stage.download(checkpoint.teacher_uri),
            backbone=described.backbone,
            image_size_pixels=described.image_size_pixels,
        ),
        described=described,
        settings=config.settings,
        report=stage.report,
    )
    metrics: dict[str, float] = {}
    for one in config.sets:
        metrics |= evaluation.measure_labelled(one.name, labelled_pair(one))
    with ShardReader(stage.download(dataset.shards_uri)) as reader:
        metrics |= evaluation.measure_collapse(reader)
    directory = stage.directory / "figures"
    directory.mkdir(parents=True, exist_ok=True)
    for name, png in evaluation.figures.items():
        (directory / name).write_bytes(png)
        stage.run.log_picture(name, png)
    return EvaluationReport(
        uri=stage.uri(stage.directory),
        sha256=digest_of(metrics),
        config_sha256=stage.config_sha256,
        parents=stage.parents,
        mlflow_run_id=stage.run.run_id,
        metrics=metrics,
        evaluation_sha256=evaluation_sha256,
        pictures=tuple(stage.uri(directory / name) for name in evaluation.figures),
    )


def labelled_pair(one: EvaluationSet) -> LabelledPair:
    """The images of a set; the key of the user's spec is named in errors.

    Raises:
        InputError: They cannot be read, or the classes of train and test differ.
    """
    try:
        return read_labelled_pair(train=one.train, test=one.test)
    except InputError as error:
        raise InputError(f"evaluation_sets: {one.name}: {error}") from error
