"""Launches the ranks of a training, waits for them and writes the checkpoint's manifest."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import get_args

from components.ranks.launcher import add_launcher_flag, check_launch, run_job
from components.runtime.context import RunContext
from components.runtime.image_sources.labelled import read_labelled_set
from components.runtime.manifests import CheckpointManifest, DatasetManifest, digest_of_file
from components.runtime.metric_log import send_unsent_rows
from components.runtime.stage import Stage, StageContext, context_of, run_stage, stage_parser
from components.runtime.storage import download, exists, join_uri, upload
from components.runtime.tracking import StageRun
from components.train.config import TrainStage
from components.train.job import CHECKPOINTS, MARKER, METRICS, Job, StageName, read_result
from dinov2_core.config.backbone import TeacherConfig
from dinov2_core.errors import DinopipeError, InputError, SettingsError, StageFailed
from k8s.launchers import Processes, TrainJobLaunch, read_launch

logger = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one of the two training stages; its flags are those of the component."""
    parser = stage_parser("Train student and teacher.", "dataset")
    parser.add_argument("--phase", required=True, choices=get_args(StageName), help="stage")
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
    stage_name: StageName,
    *,
    config: TrainStage,
    dataset: DatasetManifest,
    pretrained: CheckpointManifest | None,
    context: RunContext,
    launch: Processes | TrainJobLaunch,
) -> Stage[CheckpointManifest]:
    """The work of a training and what identifies it."""
    check_launch(launch, topology=config.topology)
    _check(config, dataset=dataset)
    weights = starting_weights(config, pretrained=pretrained, context=context)
    learning = config.learning.model_dump(
        mode="json", exclude={"checkpoints", "execution", "guards"}
    )

    def work(stage: StageContext) -> CheckpointManifest:
        return _train(
            stage_name, config=config, dataset=dataset, weights=weights, stage=stage, launch=launch
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
        complete_tracking=_send_unsent_metrics,
        scratch=(CHECKPOINTS,),  # the ranks upload them
    )


def _check(config: TrainStage, *, dataset: DatasetManifest) -> None:
    """Check what the settings ask of the data, before anything is started.

    Raises:
        SettingsError: A batch has more images than the data set.
        InputError: The probe has no labelled images.
    """
    batch = config.learning.optimization.global_batch_size
    if batch > dataset.num_kept:
        raise SettingsError(
            f"learning.optimization.global_batch_size {batch} is more than the {dataset.num_kept} "
            f"images that curation kept; choose at most {dataset.num_kept}, or give more images"
        )
    probe = config.probe
    for uri in filter(None, (probe.train, probe.test) if probe else ()):
        try:
            read_labelled_set(uri)
        except InputError as error:
            raise InputError(f"pretrain.probe: {error}") from error


def starting_weights(
    config: TrainStage, *, pretrained: CheckpointManifest | None, context: RunContext
) -> str:
    """URI, for all nodes, of the teacher to start from; empty for random weights.

    Raises:
        InputError: There are no such weights.
        AccessRefused, TransientError: The service that has them refuses, or does not answer.
    """
    if config.initial_weights:
        from components.train.starting_weights import download_weights  # loads the Hub's client

        path = download_weights(
            config.initial_weights,
            directory=context.root / "weights",
            tracking_uri=context.resolved_tracking_uri,
        )
        if not path.is_relative_to(context.root):
            return str(path)
        upload(path, context.uri_of(path))  # ranks on other nodes need them too
        return context.uri_of(path)
    uri = pretrained.teacher_uri if pretrained else ""
    if uri and not exists(uri):
        raise InputError(
            f"weights {uri} named by the pretrained manifest do not exist; run the stage before "
            "again"
        )
    return uri


def _train(
    stage_name: StageName,
    *,
    config: TrainStage,
    dataset: DatasetManifest,
    weights: str,
    stage: StageContext,
    launch: Processes | TrainJobLaunch,
) -> CheckpointManifest:
    """Start the ranks, wait for them and describe their result."""
    job = Job(
        stage_name=stage_name,
        stage=config,
        context=stage.context,
        directory=stage.uri(stage.directory),
        shards=dataset.shards_uri,
        starting_weights=weights,
        mlflow_run_id=stage.run.run_id,
    )
    stage.run.log_dataset(
        name=dataset.kind, uri=dataset.shards_uri, digest=dataset.sha256, context="training"
    )
    stage.report("starting", 0, config.learning.optimization.num_steps, unit="step")
    run_job(job, launch=launch, lock=stage.lock, report=stage.report)
    result = read_result(job)
    if result is None:
        raise StageFailed(f"the result of {job.directory} was removed by somebody; start again")
    learning = config.learning
    return CheckpointManifest(
        uri=stage.uri(job.teacher),
        sha256=result.teacher_sha256,
        config_sha256=stage.config_sha256,
        parents=stage.parents,
        mlflow_run_id=stage.run.run_id,
        phase=stage_name,
        teacher_uri=stage.uri(job.teacher),
        checkpoints_uri=stage.uri(job.checkpoints),
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


def _send_unsent_metrics(manifest: CheckpointManifest, run: StageRun) -> None:
    """Send what ranks could not, to the run of their stage, if MLflow answers now."""
    metrics = join_uri(manifest.teacher_uri.rpartition("/")[0], METRICS)
    try:
        send_unsent_rows(metrics, replace(run, run_id=manifest.mlflow_run_id), marker=MARKER)
    except DinopipeError as error:  # a training is finished without its metrics
        logger.warning("the last rows of %s are still not in MLflow: %s", metrics, error)
