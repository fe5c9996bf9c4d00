"""Launches the ranks of a training phase, waits for them and writes the checkpoint's manifest."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from components.ranks.launcher import add_launcher_flag, check_launch, run_job
from components.runtime.context import RunContext
from components.runtime.image_sources.labelled import read_labelled_set
from components.runtime.manifests import (
    CheckpointManifest,
    DatasetManifest,
    digest_of_file,
)
from components.runtime.stage import (
    Stage,
    StageContext,
    context_of,
    run_stage,
    stage_parser,
)
from components.runtime.storage import download, exists, upload
from components.train.config import TrainStage
from components.train.job import CHECKPOINTS, Job, Phase, read_result
from dinov2_core.config.backbone import TeacherConfig
from dinov2_core.errors import StageFailed
from k8s.launchers import ClusterLaunch, Processes, read_launch

logger = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one of the two training stages; its flags are those of the component."""
    parser = stage_parser("Train student and teacher.", "dataset")
    parser.add_argument("--phase", required=True, choices=get_args(Phase), help="stage")
    parser.add_argument("--pretrained", type=Path, help="manifest: pretrained, to start from")
    add_launcher_flag(parser)
    args = parser.parse_args(argv)
    _check_phase(args, parser)
    return run_stage(args.phase, args=args, prepare=_prepare)


def _prepare(args: argparse.Namespace) -> Stage[CheckpointManifest]:
    return _stage(
        args.phase,
        config=TrainStage.model_validate_json(args.config),
        dataset=DatasetManifest.read(args.dataset),
        pretrained=CheckpointManifest.read(args.pretrained) if args.pretrained else None,
        context=context_of(args),
        launch=read_launch(args.launcher),
    )


def _check_phase(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    if (args.phase == "finetune") != (args.pretrained is not None):
        parser.error("--pretrained belongs to --phase finetune, and that phase needs it")


def _stage(
    phase: Phase,
    *,
    config: TrainStage,
    dataset: DatasetManifest,
    pretrained: CheckpointManifest | None,
    context: RunContext,
    launch: Processes | ClusterLaunch,
) -> Stage[CheckpointManifest]:
    """The work of a phase and what identifies it."""
    check_launch(launch, topology=config.topology)
    _check(config, dataset=dataset)
    weights = starting_weights(config, pretrained=pretrained, context=context)
    learning = config.learning.model_dump(
        mode="json", exclude={"checkpoints", "execution", "guards"}
    )

    def work(place: StageContext) -> CheckpointManifest:
        return _train(
            phase, config=config, dataset=dataset, weights=weights, place=place, launch=launch
        )

    return Stage(
        manifest_type=CheckpointManifest,
        settings=config,
        identity={
            "learning": learning,
            "world_size": config.topology.world_size,
            "initial_weights": digest_of_file(download(weights)) if weights else "",
        },
        parents=(dataset, pretrained) if pretrained else (dataset,),
        work=work,
        is_intact=lambda manifest, _: exists(manifest.teacher_uri),
        scratch=(CHECKPOINTS,),  # the ranks bring them to the store
    )


def _check(config: TrainStage, *, dataset: DatasetManifest) -> None:
    """Refuse what cannot train, before anything is started.

    Raises:
        ValueError: More images in a batch than in the data set.
        InputError: A probe has no labelled images.
    """
    batch = config.learning.optimization.global_batch_size
    if batch > dataset.num_kept:
        raise ValueError(
            f"learning.optimization.global_batch_size {batch} is more than the {dataset.num_kept} "
            f"images that curation kept; choose at most {dataset.num_kept}, or give more images"
        )
    probe = config.probe
    for uri in (probe.train, probe.test) if probe else ():
        if uri:
            read_labelled_set(uri)


def starting_weights(
    config: TrainStage, *, pretrained: CheckpointManifest | None, context: RunContext
) -> str:
    """Place of the teacher to start from, for all nodes; empty for random weights.

    Raises:
        ValueError: There are no such weights.
        StoreRefused, StoreUnavailable: The store refuses, or does not answer.
    """
    if config.initial_weights:
        from components.train.starting_weights import fetch_weights  # most runs fetch nothing

        fetched = fetch_weights(
            config.initial_weights,
            directory=context.root / "weights",
            tracking_uri=context.resolved_tracking_uri,
        )
        if not fetched.is_relative_to(context.root):
            return str(fetched)
        upload(fetched, context.uri_of(fetched))  # ranks on other nodes need them too
        return context.uri_of(fetched)
    place = pretrained.teacher_uri if pretrained else ""
    if place and not exists(place):
        raise ValueError(
            f"weights {place} named by the pretrained manifest do not exist; run the stage before "
            "again"
        )
    return place


def _train(
    phase: Phase,
    *,
    config: TrainStage,
    dataset: DatasetManifest,
    weights: str,
    place: StageContext,
    launch: Processes | ClusterLaunch,
) -> CheckpointManifest:
    """Start the ranks, wait for them and describe what they left."""
    job = Job(
        phase=phase,
        stage=config,
        context=place.context,
        directory=place.uri(place.directory),
        shards=dataset.shards_uri,
        starting_weights=weights,
        mlflow_run_id=place.run.run_id,
    )
    place.run.log_dataset(
        name=dataset.kind, uri=dataset.shards_uri, digest=dataset.sha256, context="training"
    )
    place.report("starting", 0, config.learning.optimization.num_steps, unit="step")
    run_job(job, launch=launch, lock=place.lock, report=place.report)
    result = read_result(job)
    if result is None:
        raise StageFailed(f"the result of {job.directory} was removed meanwhile; start again")
    learning = config.learning
    return CheckpointManifest(
        uri=place.uri(job.teacher),
        sha256=result.teacher_sha256,
        config_sha256=place.config_sha256,
        parents=place.parents,
        mlflow_run_id=place.run.run_id,
        phase=phase,
        teacher_uri=place.uri(job.teacher),
        checkpoints_uri=place.uri(job.checkpoints),
        teacher=TeacherConfig(
            backbone=learning.backbone,
            image_size_pixels=learning.crops.global_crop_size_pixels,
            mean=learning.crops.mean,
            standard_deviation=learning.crops.standard_deviation,
        ),
        step=result.step,
        final_losses=result.final_losses,
        images_per_second=result.images_per_second,
    )
