"""Registers a teacher as a model version; a gate decides its alias."""

from __future__ import annotations

import argparse
import io
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from safetensors.torch import load_file

from components.register.bundle import write_model_code
from components.register.config import Gate, RegisterStage
from components.runtime.manifests import (
    CheckpointManifest,
    DatasetManifest,
    EvaluationReport,
    Registration,
    digest_of,
    write_atomically,
)
from components.runtime.registry import (
    EVALUATION_TAG,
    METRIC_TAG,
    VALUE_TAG,
    RegisteredVersion,
    Registry,
)
from components.runtime.stage import Stage, StageContext, context_of, run_stage, stage_parser
from components.runtime.tracking import StageRun
from dinov2_core.errors import SettingsError
from dinov2_core.weights_file import write_weights

BACKBONE = "backbone."
"""Prefix of the backbone's weights in a teacher's file; heads are not registered."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the stage; its flags are those of the component."""
    parser = stage_parser("Register a teacher.", "dataset", "checkpoint", "report")
    return run_stage("register", args=parser.parse_args(argv), prepare=_stage)


def _stage(args: argparse.Namespace) -> Stage[Registration]:
    config = RegisterStage.model_validate_json(args.config)
    dataset = DatasetManifest.read(args.dataset)
    checkpoint = CheckpointManifest.read(args.checkpoint)
    report = EvaluationReport.read(args.report)

    def work(stage: StageContext) -> Registration:
        return _register(config, dataset, checkpoint, report, stage)

    return Stage(
        manifest_type=Registration,
        settings=config,
        identity={
            "config": config.model_dump(mode="json"),
            "tracking": context_of(args).resolved_tracking_uri,
        },
        parents=(dataset, checkpoint, report),
        work=work,
        is_intact=_holds,
    )


def _holds(registration: Registration, run: StageRun) -> bool:
    """Whether the registry still has the version under the alias that it was given."""
    found = Registry(run, registration.model_name).under_alias(registration.alias)
    return found is not None and found.version == registration.model_version


def _register(
    config: RegisterStage,
    dataset: DatasetManifest,
    checkpoint: CheckpointManifest,
    report: EvaluationReport,
    stage: StageContext,
) -> Registration:
    registry = Registry(stage.run, config.model_name)
    stage.report("deciding", 0, 2, unit="step")
    decision = decide(
        config.gate, report=report, champion=registry.under_alias(config.champion_alias)
    )
    stage.report("registering", 1, 2, unit="step")
    version = _add_version(registry, checkpoint, report, stage)
    alias = config.champion_alias if decision.is_champion else config.challenger_alias
    registry.decide(
        version.version,
        alias=alias,
        tags={
            "dinopipe.decision": decision.sentence,
            METRIC_TAG: config.gate.metric if config.gate else "",
            VALUE_TAG: repr(decision.value) if decision.value is not None else "",
            EVALUATION_TAG: report.evaluation_sha256,
            "dinopipe.dataset_sha256": dataset.sha256,
            "dinopipe.teacher_sha256": checkpoint.sha256,
            "dinopipe.run_id": stage.context.run_id,
        },
    )
    stage.report("registering", 2, 2, unit="step")
    return Registration(
        uri=f"models:/{config.model_name}/{version.version}",
        sha256=digest_of([checkpoint.sha256, report.sha256, version.version]),
        config_sha256=stage.config_sha256,
        parents=stage.parents,
        mlflow_run_id=stage.run.run_id,
        model_name=config.model_name,
        model_version=version.version,
        alias=alias,
        decision=decision.sentence,
        tracking_uri=stage.context.resolved_tracking_uri,
    )


def _add_version(
    registry: Registry,
    checkpoint: CheckpointManifest,
    report: EvaluationReport,
    stage: StageContext,
) -> RegisteredVersion:
    directory = stage.directory
    weights, config = directory / "teacher.safetensors", directory / "teacher.json"
    tensors = load_file(stage.download(checkpoint.teacher_uri))
    backbone = {k.removeprefix(BACKBONE): v for k, v in tensors.items() if k.startswith(BACKBONE)}
    write_weights(backbone, path=weights)
    described = checkpoint.teacher.registered_form()
    write_atomically(config, json.dumps(described, indent=2) + "\n")
    report.write(directory / "evaluation.json")
    with tempfile.TemporaryDirectory() as scratch:
        code = write_model_code(Path(scratch))
        return registry.add(
            code=code.model,
            package=code.package,
            weights=weights,
            config=config,
            example=_example_image(checkpoint),
            documents={"evaluation": directory / "evaluation.json"},
            metrics=report.metrics,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """The gate's decision."""

    is_champion: bool
    sentence: str
    value: float | None


def decide(
    gate: Gate | None, *, report: EvaluationReport, champion: RegisteredVersion | None
) -> Decision:
    """Whether a new model becomes the champion, and why.

    Args:
        gate: Metric and minimum gain; None lets every model through.
        report: Numbers of the new model.
        champion: Current champion; None if there is none.

    Raises:
        SettingsError: The metric was not measured.
    """
    if gate is None:
        return Decision(is_champion=True, sentence="no gate is set", value=None)
    if gate.metric not in report.metrics:
        raise SettingsError(
            f"gate metric {gate.metric} was not measured; set registry.gate.metric to one of "
            f"{', '.join(report.metrics)}"
        )
    value = report.metrics[gate.metric]
    new = f"{gate.metric} {value:.4f}"
    untrained = report.metrics.get(f"{gate.metric}_untrained")
    if gate.beats_untrained and untrained is not None and value <= untrained:
        sentence = f"{new} does not beat the same architecture untrained ({untrained:.4f})"
        return Decision(is_champion=False, sentence=sentence, value=value)
    if champion is None:
        return Decision(is_champion=True, sentence=f"{new}; the first champion", value=value)
    old_value, tags = champion.tags.get(VALUE_TAG, ""), champion.tags
    named = f"champion (version {champion.version})"
    comparable = (
        tags.get(METRIC_TAG) == gate.metric
        and tags.get(EVALUATION_TAG) == report.evaluation_sha256
        and old_value
    )
    if not comparable:
        sentence = f"{new}, but the {named} was not measured with it on the same sets"
        return Decision(is_champion=False, sentence=sentence, value=value)
    gain = value - float(old_value)
    sentence = (
        f"{new} is {gain:+.4f} from the {named}; a gain of {gate.minimum_gain:+.4f} is needed"
    )
    return Decision(is_champion=gain >= gate.minimum_gain, sentence=sentence, value=value)


def _example_image(checkpoint: CheckpointManifest) -> bytes:
    """A plain image of the teacher's own size and number of channels, as a PNG file."""
    teacher = checkpoint.teacher
    mode = "L" if teacher.backbone.num_channels == 1 else "RGB"
    size = (teacher.image_size_pixels, teacher.image_size_pixels)
    buffer = io.BytesIO()
    Image.radial_gradient("L").resize(size).convert(mode).save(buffer, "PNG")
    return buffer.getvalue()
