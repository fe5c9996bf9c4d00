"""The spec: one YAML file, one frozen tree of settings, and the table of its stages."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from pydantic import Field, ValidationError, model_validator

from components.curate.config import CurateSettings, CurateStage, Images
from components.evaluate.config import EvaluateSettings, EvaluateStage, EvaluationSet
from components.local_paths import local_paths, with_absolute_paths
from components.register.config import RegisterStage
from components.train.config import Probe, TrainStage
from dinov2_core.config.frozen import Frozen
from dinov2_core.config.training import HighResolution, TrainingConfig
from k8s.launchers import Processes
from pipelines.spec.placement import Placement, Resources
from pipelines.spec.problems import FoundProblems, Problem, SpecError, problems_of
from pipelines.spec.schedule import Schedule
from pipelines.spec.secrets import find_secrets
from pipelines.spec.yaml_file import read_yaml

RESERVED_ALIAS = "latest"


@dataclass(frozen=True, slots=True, kw_only=True)
class StageDefinition:
    """What the command line, the graph and the plan need to know of a stage."""

    resources: str
    """Key of the stage in `resources` of a spec."""
    trains: bool = False
    """Whether its work is done by ranks, which may have pods of their own."""


STAGES = {
    "curate": StageDefinition(resources="curate"),
    "pretrain": StageDefinition(resources="pretrain", trains=True),
    "finetune": StageDefinition(resources="finetune", trains=True),
    "evaluate": StageDefinition(resources="evaluate"),
    "register": StageDefinition(resources="registry"),
}
"""All stages by the name of their task, in the order in which they run.

A new stage is a folder of `components`, an entry here with its settings and resources below, and a
task in `pipelines.graph.dinov2`.
"""


class StageResources(Frozen):
    """Resources of each stage."""

    curate: Resources = Resources()
    """Of the stage that curates. Where it embeds on pods of its own (a cluster launcher and
    curate.embedding_topology), each of those gets the same, and the stage's pod, which searches for
    copies afterwards, all but the accelerators."""
    pretrain: Resources = Resources()
    """Of the stage that pretrains; of each node, where it trains on several."""
    finetune: Resources = Resources()
    """Of the stage that trains at high resolution; of each node as well."""
    evaluate: Resources = Resources()
    """Of the stage that evaluates."""
    registry: Resources = Resources()
    """Of the stage that registers."""

    def of(self, stage: str) -> Resources:
        """The resources of a stage by the name of its task."""
        found: Resources = getattr(self, STAGES[stage].resources)
        return found


class Tracking(Frozen):
    """Where runs and models are recorded."""

    uri: str = ""
    """MLflow server; empty is an SQLite store in the work directory."""
    experiment: str = Field("dinopipe", min_length=1)
    """MLflow experiment."""


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
    """First stage: which images are kept."""
    pretrain: TrainStage
    """Second stage: what is learned."""
    finetune: HighResolution = HighResolution()
    """Third stage: training goes on at a higher resolution."""
    evaluate: EvaluateSettings = EvaluateSettings()
    """Fourth stage: how features are measured."""
    registry: RegisterStage
    """Fifth stage: model name, aliases and gate."""
    tracking: Tracking = Tracking()
    """Where runs and models are recorded."""
    resources: StageResources = StageResources()
    """What each stage requests from a cluster; no effect on this machine."""
    placement: Placement = Placement()
    """Where a cluster runs it; no effect on this machine."""
    use_cache: bool = True
    """Whether the result of a finished stage with the same inputs and settings is reused."""
    schedule: Schedule | None = None
    """When a cluster runs it by itself; no effect on single runs."""

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        problems = [
            *find_secrets(self.model_dump(mode="json")),
            *self._size_problems(),
            *self._registry_problems(),
            *self._name_problems(),
        ]
        if problems:
            raise FoundProblems(problems)
        return self

    def _size_problems(self) -> Iterator[Problem]:
        """Crops that are no whole number of patches, batches that ranks cannot share."""
        learning, finetune = self.pretrain.learning, self.finetune
        patch = learning.backbone.patch_size_pixels
        for path, size in (
            ("finetune.global_crop_size_pixels", finetune.global_crop_size_pixels),
            ("finetune.local_crop_size_pixels", finetune.local_crop_size_pixels),
            ("evaluate.image_size_pixels", self.evaluate.image_size_pixels),
        ):
            if size is not None and size % patch:
                message = (
                    f"is not divisible by pretrain.learning.backbone.patch_size_pixels {patch}; "
                    f"choose {max(size // patch, 1) * patch} or {(size // patch + 1) * patch}"
                )
                yield Problem(path=path, value=size, message=message)
        batch, world = finetune.global_batch_size, self.pretrain.topology.world_size
        parts = world * learning.optimization.accumulation_steps
        if batch % parts:
            message = (
                f"is not divisible by {parts}: {world} ranks (pretrain.topology) times "
                f"optimization.accumulation_steps; choose a multiple of {parts}"
            )
            yield Problem(path="finetune.global_batch_size", value=batch, message=message)

    def _registry_problems(self) -> Iterator[Problem]:
        registry, gate, known = self.registry, self.registry.gate, self.metric_names
        if registry.champion_alias == registry.challenger_alias:
            yield Problem(
                path="registry.challenger_alias",
                value=registry.challenger_alias,
                message="is the champion's alias too; choose two different words",
            )
        for field in ("champion_alias", "challenger_alias"):
            alias = getattr(registry, field)
            if alias == RESERVED_ALIAS or (alias[:1] == "v" and alias[1:].isdigit()):
                message = "is reserved by MLflow; choose another word, such as champion"
                yield Problem(path=f"registry.{field}", value=alias, message=message)
        if gate is not None and gate.metric not in known:
            message = (
                f"is not measured; choose one of {', '.join(known) or 'none'} (they follow from "
                "evaluation_sets)"
            )
            yield Problem(path="registry.gate.metric", value=gate.metric, message=message)

    def _name_problems(self) -> Iterator[Problem]:
        """Names that are needed, missing or used twice."""
        kind = self.placement.launcher.kind
        if not isinstance(self.placement.launcher, Processes) and "@sha256:" not in self.image:
            message = (
                f"has no digest, and pods of a {kind} may each pull another image of that name; "
                "write NAME@sha256:DIGEST"
            )
            yield Problem(path="image", value=self.image, message=message)
        defects = self.images.synthetic_defects
        if defects is not None and defects.leaks and not self.evaluation_sets:
            message = "cannot be made without evaluation_sets; set it to 0 or name a set"
            path = "images.synthetic_defects.leaks"
            yield Problem(path=path, value=defects.leaks, message=message)
        names = [item.name for item in self.evaluation_sets]
        for i, name in enumerate(names):
            if name in names[:i]:
                message = "is used twice; give every set its own name"
                yield Problem(path=f"evaluation_sets.{i}.name", value=name, message=message)

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
        no test image is used.
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
    def local_paths(self) -> dict[str, str]:
        """Every path on this machine that some stage reads, by its key in the spec."""
        return local_paths(self)


def load_spec(path: Path) -> PipelineSpec:
    """Read and check a spec; relative paths in it are taken from the folder it lies in.

    Raises:
        InputError: The file is missing, or is not YAML.
        SpecError: Settings are wrong; it lists all of them.
    """
    values = read_yaml(path)
    # First of all, because the messages of other problems show the values.
    secrets = find_secrets(values)
    if secrets:
        raise SpecError(secrets)
    try:
        spec = PipelineSpec.model_validate_json(json.dumps(values))
    except ValidationError as error:
        raise SpecError(problems_of(error, model=PipelineSpec, values=values)) from error
    return with_absolute_paths(spec, folder=path.parent.resolve())
