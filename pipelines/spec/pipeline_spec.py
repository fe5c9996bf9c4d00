"""The spec: one YAML file, one frozen tree, one door."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Self
from urllib.parse import urlsplit

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from components.curate.config import (
    CurateSettings,
    CurateStage,
    Embedding,
    Images,
    TimmEmbedding,
    TorchScriptEmbedding,
)
from components.evaluate.config import EvaluateSettings, EvaluateStage, EvaluationSet
from components.register.config import RegisterStage
from components.train.config import Probe, TrainStage, is_weights_file
from dinov2_core.config.frozen import Frozen
from dinov2_core.config.training import HighResolution, TrainingConfig
from k8s.launchers import Processes
from pipelines.spec.placement import Placement, StageResources
from pipelines.spec.problems import Problem, SpecError, problems_of
from pipelines.spec.schedule import Schedule
from pipelines.spec.secrets import secret_places

STAGES = ("curate", "pretrain", "finetune", "evaluate", "register")
RESERVED_ALIAS = "latest"


class Tracking(Frozen):
    """Where runs and models are recorded."""

    uri: str = ""
    """MLflow server; empty is an SQLite store in the work directory."""
    experiment: str = Field("dinopipe", min_length=1)
    """MLflow experiment."""

    @field_validator("uri")
    @classmethod
    def _no_secret(cls, uri: str) -> str:
        if urlsplit(uri).username is not None or urlsplit(uri).password is not None:
            raise ValueError(
                "holds a password or token; take it out and set MLFLOW_TRACKING_USERNAME and "
                "MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN, in the environment"
            )
        return uri


class PipelineSpec(Frozen):
    """Everything that a run is made of."""

    name: str = Field(pattern="^[a-z]([a-z0-9-]{0,40}[a-z0-9])?$")
    """Name of the pipeline: lower-case letters, digits, dashes."""
    image: str = Field("dinopipe:0.1.0", min_length=1)
    """Container image of all stages; on a cluster by digest (name@sha256:...)."""
    images: Images
    """The unlabelled source images."""
    evaluation_sets: tuple[EvaluationSet, ...] = ()
    """Labelled sets that the features are measured on."""
    curate: CurateSettings = CurateSettings()
    """First stage: what is kept."""
    pretrain: TrainStage
    """Second stage: what is learned."""
    finetune: HighResolution = HighResolution()
    """Third stage: the same at a higher resolution."""
    evaluate: EvaluateSettings = EvaluateSettings()
    """Fourth stage: how features are measured."""
    registry: RegisterStage
    """Fifth stage: model name, aliases and gate."""
    tracking: Tracking = Tracking()
    """Where runs and models are recorded."""
    resources: StageResources = StageResources()
    """What each stage asks a cluster for."""
    placement: Placement = Placement()
    """Where a cluster runs it; without effect on this machine."""
    use_cache: bool = True
    """Whether a finished stage with the same inputs and settings is taken over."""
    schedule: Schedule | None = None
    """When a cluster runs it by itself; without effect on single runs."""

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        problems = [*self._finetune_problems(), *self._registry_problems()]
        problems += self._placement_problems()
        problems += _secret_problems(self.model_dump(mode="json"))
        defects = self.images.synthetic_defects
        if defects is not None and defects.leaks and not self.evaluation_sets:
            message = "cannot be made without evaluation_sets; set it to 0 or name a set"
            path = "images.synthetic_defects.leaks"
            problems.append(Problem(path=path, value=defects.leaks, message=message))
        names = [item.name for item in self.evaluation_sets]
        problems += [
            Problem(
                path=f"evaluation_sets.{i}.name",
                value=name,
                message="is used twice; give every set its own name",
            )
            for i, name in enumerate(names)
            if name in names[:i]
        ]
        if problems:
            raise SpecError(problems)
        return self

    def _finetune_problems(self) -> list[Problem]:
        phase, learning = self.finetune, self.pretrain.learning
        patch, world = learning.backbone.patch_size_pixels, self.pretrain.topology.world_size
        problems = [
            Problem(
                path=f"finetune.{name}",
                value=size,
                message=f"is not divisible by pretrain.learning.backbone.patch_size_pixels "
                f"{patch}; choose {max(size // patch, 1) * patch} or {(size // patch + 1) * patch}",
            )
            for name, size in (
                ("global_crop_size_pixels", phase.global_crop_size_pixels),
                ("local_crop_size_pixels", phase.local_crop_size_pixels),
            )
            if size % patch
        ]
        parts = world * learning.optimization.accumulation_steps
        if phase.global_batch_size % parts:
            problems.append(
                Problem(
                    path="finetune.global_batch_size",
                    value=phase.global_batch_size,
                    message=f"is not divisible by {parts}: {world} ranks (pretrain.topology) "
                    f"times optimization.accumulation_steps; choose a multiple of {parts}",
                )
            )
        size = self.evaluate.image_size_pixels
        if size is not None and size % patch:
            problems.append(
                Problem(
                    path="evaluate.image_size_pixels",
                    value=size,
                    message=f"is not divisible by the patch size {patch}; choose a multiple",
                )
            )
        return problems

    def _placement_problems(self) -> list[Problem]:
        if isinstance(self.placement.launcher, Processes) or "@sha256:" in self.image:
            return []
        message = (
            f"has no digest, and pods of a {self.placement.launcher.kind} may each pull another "
            "image of that name; write NAME@sha256:DIGEST"
        )
        return [Problem(path="image", value=self.image, message=message)]

    def _registry_problems(self) -> list[Problem]:
        problems = []
        if self.registry.champion_alias == self.registry.challenger_alias:
            problems.append(
                Problem(
                    path="registry.challenger_alias",
                    value=self.registry.challenger_alias,
                    message="is the champion's alias too; choose two different words",
                )
            )
        for field in ("champion_alias", "challenger_alias"):
            alias = getattr(self.registry, field)
            if alias == RESERVED_ALIAS or (alias[:1] == "v" and alias[1:].isdigit()):
                problems.append(
                    Problem(
                        path=f"registry.{field}",
                        value=alias,
                        message="is reserved by MLflow; choose another word, such as champion",
                    )
                )
        gate, known = self.registry.gate, self.metric_names
        if gate is not None and gate.metric not in known:
            problems.append(
                Problem(
                    path="registry.gate.metric",
                    value=gate.metric,
                    message=f"is not measured; choose one of {', '.join(known) or 'none'} "
                    f"(they follow from evaluation_sets)",
                )
            )
        return problems

    @property
    def metric_names(self) -> tuple[str, ...]:
        """Metrics that a gate can decide on."""
        return tuple(
            f"{item.name}/{kind}"
            for item in self.evaluation_sets
            for kind in ("knn_top1", "logistic_top1")
        )

    @property
    def curate_stage(self) -> CurateStage:
        """Settings of the first stage."""
        return CurateStage(
            images=self.images,
            evaluation_images=tuple(item.test for item in self.evaluation_sets),
            settings=self.curate,
        )

    @property
    def pretrain_stage(self) -> TrainStage:
        """Settings of the second stage.

        Without a probe of its own it gets one of the first evaluation set's train images, so that
        no test image is looked at.
        """
        probe = self._probe(self.pretrain.learning)
        return self.pretrain.model_copy(update={"probe": probe})

    @property
    def finetune_stage(self) -> TrainStage:
        """Settings of the third stage, with the schedules compressed."""
        learning = self.pretrain.learning.at_high_resolution(self.finetune)
        return TrainStage(
            learning=learning,
            topology=self.pretrain.topology,
            probe=self._probe(learning),
            log_every_steps=self.pretrain.log_every_steps,
        )

    def _probe(self, learning: TrainingConfig) -> Probe | None:
        """The given probe, or one of an evaluation set's train images as often as checkpoints."""
        if self.pretrain.probe is not None or not self.evaluation_sets:
            return self.pretrain.probe
        every_steps = learning.checkpoints.every_steps
        return Probe(train=self.evaluation_sets[0].train, every_steps=every_steps)

    @property
    def evaluate_stage(self) -> EvaluateStage:
        """Settings of the fourth stage."""
        return EvaluateStage(sets=self.evaluation_sets, settings=self.evaluate)

    @property
    def local_places(self) -> tuple[str, ...]:
        """Every path on this machine that some stage reads."""
        probe, seeds = self.pretrain.probe, self.curate.seed_retrieval
        places = [
            self.images.uri,
            *(place for item in self.evaluation_sets for place in (item.train, item.test)),
            self.curate.embedding.weights_file,
            seeds.uri if seeds else "",
            *((probe.train, probe.test) if probe else ()),
        ]
        if is_weights_file(self.pretrain.initial_weights):
            places.append(self.pretrain.initial_weights)
        return tuple(place for place in places if place and "://" not in place)

    def rooted(self, folder: Path) -> PipelineSpec:
        """The same with relative paths taken from a folder."""

        def root(uri: str) -> str:
            return uri if "://" in uri or Path(uri).is_absolute() else str((folder / uri).resolve())

        images = self.images.model_copy(update={"uri": root(self.images.uri)})
        sets = tuple(
            item.model_copy(update={"train": root(item.train), "test": root(item.test)})
            for item in self.evaluation_sets
        )
        curate = self.curate
        curate = curate.model_copy(update={"embedding": _rooted_embedding(curate.embedding, root)})
        if curate.seed_retrieval is not None:
            seeds = curate.seed_retrieval
            seeds = seeds.model_copy(update={"uri": root(seeds.uri)})
            curate = curate.model_copy(update={"seed_retrieval": seeds})
        weights = self.pretrain.initial_weights
        pretrain = self.pretrain.model_copy(
            update={
                "initial_weights": root(weights) if is_weights_file(weights) else weights,
                "probe": self._rooted_probe(root),
            }
        )
        return self.model_copy(
            update={
                "images": images,
                "evaluation_sets": sets,
                "curate": curate,
                "pretrain": pretrain,
            }
        )

    def _rooted_probe(self, root: Callable[[str], str]) -> Probe | None:
        probe = self.pretrain.probe
        if probe is None:
            return None
        test = root(probe.test) if probe.test else ""
        return probe.model_copy(update={"train": root(probe.train), "test": test})


def _rooted_embedding(embedding: Embedding, root: Callable[[str], str]) -> Embedding:
    match embedding:
        case TimmEmbedding(weights=str(file)):
            return embedding.model_copy(update={"weights": root(file)})
        case TorchScriptEmbedding(path=file):
            return embedding.model_copy(update={"path": root(file)})
        case _:
            return embedding


def _secret_problems(values: object) -> list[Problem]:
    return [Problem(path=path, value=None, message=why) for path, why in secret_places(values)]


def load_spec(path: Path) -> PipelineSpec:
    """Read and check a spec; relative paths in it are taken from the folder it lies in.

    Raises:
        SpecError: The file is missing, is not YAML, or has settings that are wrong; it lists all.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        reason = error.strerror or "unreadable"
        raise SpecError(
            [Problem(path="", value=str(path), message=f"{reason}; dinopipe init writes a spec")]
        ) from error
    try:
        values = json.loads(json.dumps(yaml.safe_load(text)))
    except (yaml.YAMLError, TypeError) as error:
        raise SpecError(
            [Problem(path="", value=str(path), message=f"is not YAML: {error}")]
        ) from error
    # First of all, because other complaints show what they complain about.
    secrets = _secret_problems(values)
    if secrets:
        raise SpecError(secrets)
    try:
        spec = PipelineSpec.model_validate_json(json.dumps(values))
    except ValidationError as error:
        raise SpecError(problems_of(error, model=PipelineSpec, values=values)) from error
    return spec.rooted(path.parent.resolve())
