"""Manifests: the small JSON documents that stages hand to each other instead of bulk data."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, Field, ValidationError

from dinov2_core.config.backbone import TeacherConfig
from dinov2_core.config.frozen import Frozen
from dinov2_core.errors import InputError


def digest_of(value: object) -> str:
    """Hex sha256 of a value's canonical JSON; equal content gives equal digests.

    Args:
        value: Anything that `json.dumps` takes, or a pydantic model.
    """
    if isinstance(value, BaseModel):
        value = value.model_dump(mode="json")
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def digest_of_file(path: Path) -> str:
    """Hex sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_atomically(path: Path, text: str) -> None:
    """Write a small text file so that a reader sees the old one or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


class Parent(Frozen):
    """A manifest that this one was made from."""

    kind: str
    """What it describes."""
    sha256: str
    """Digest of what it describes."""


class Manifest(Frozen):
    """What every manifest holds."""

    uri: str
    """Directory or file that holds the bytes: a path or an s3:// URI."""
    sha256: str
    """Digest of the content the manifest stands for; the same content has the same digest."""
    config_sha256: str
    """Digest of the settings that made it."""
    parents: tuple[Parent, ...] = ()
    """Manifests it was made from."""
    mlflow_run_id: str = ""
    """Run that logged the stage which made it."""

    @property
    def numbers(self) -> dict[str, float]:
        """What was measured, under the names that MLflow, Kubeflow and run.json show."""
        return {}

    @property
    def headline(self) -> str:
        """The outcome in a line or two, for logs and tables."""
        return ", ".join(f"{name} {value:.4g}" for name, value in self.numbers.items())

    def write(self, path: Path) -> None:
        """Write as JSON, atomically."""
        write_atomically(path, self.model_dump_json(indent=2) + "\n")

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read and check a manifest.

        Raises:
            InputError: The file is missing or is not such a manifest.
        """
        try:
            return cls.of(path.read_text(encoding="utf-8"), source=str(path))
        except FileNotFoundError as error:
            raise InputError(
                f"manifest {path} does not exist; run the stage that writes it first"
            ) from error

    @classmethod
    def of(cls, text: str, *, source: str) -> Self:
        """Check the text of a manifest.

        Args:
            text: JSON.
            source: Path or URI of it, for messages.

        Raises:
            InputError: It is not such a manifest.
        """
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            raise InputError(f"{source} is not a {cls.__name__}: {error}") from error


class AuditReport(Frozen):
    """How many of the synthetic defects curation found; shares in [0, 1]."""

    exact_recall: float
    """Share of byte-identical copies that were removed."""
    near_recall: float
    """Share of changed copies that were removed."""
    leak_recall: float
    """Share of evaluation images that were removed."""
    corrupt_recall: float
    """Share of defective files that were removed."""
    distinct_lost: float
    """Share of the distinct images of which no copy was kept."""


class DatasetManifest(Manifest):
    """A curated data set: shards of the kept images and a table of all images."""

    kind: Literal["dataset"] = "dataset"
    num_images: int = Field(ge=0)
    """Files that were scanned."""
    num_kept: int = Field(ge=0)
    """Images kept, all of them in the shards."""
    reasons: dict[str, int]
    """Number of files dropped, by reason."""
    table_uri: str
    """Parquet file with one row per scanned file."""
    shards_uri: str
    """Directory of the shards and of their index."""
    num_shards: int = Field(ge=0)
    """Number of shard files."""
    size_bytes: int = Field(ge=0)
    """Bytes of all shards."""
    audit: AuditReport | None = None
    """Null without synthetic defects."""

    @property
    def numbers(self) -> dict[str, float]:
        """Counts, and what the audit found."""
        counts = {"num_images": self.num_images, "num_kept": self.num_kept}
        counts |= {f"set_aside/{reason}": count for reason, count in self.reasons.items()}
        audit = self.audit.model_dump() if self.audit is not None else {}
        shares = {f"audit/{name}": share for name, share in audit.items()}
        return {name: float(value) for name, value in (counts | shares).items()}

    @property
    def headline(self) -> str:
        """How many images were kept, why others were not, and what the audit found."""
        reasons = ", ".join(f"{count} {name}" for name, count in self.reasons.items()) or "none"
        line = f"{self.num_kept} of {self.num_images} kept; set aside: {reasons}"
        audit = self.audit
        if audit is None:
            return line
        return (
            f"{line}\nsynthetic defects found: {audit.exact_recall:.1%} of exact copies, "
            f"{audit.near_recall:.1%} of near copies, {audit.leak_recall:.1%} of leaks, "
            f"{audit.corrupt_recall:.1%} of corrupt files; "
            f"{audit.distinct_lost:.2%} of distinct images lost"
        )

    def counts_add_up(self) -> bool:
        """Whether every file is either kept or dropped for one reason."""
        return self.num_images == self.num_kept + sum(self.reasons.values())


class CheckpointManifest(Manifest):
    """A trained teacher and the resumable state it came from."""

    kind: Literal["checkpoint"] = "checkpoint"
    phase: Literal["pretrain", "finetune"]
    """Stage that trained it."""
    teacher_uri: str
    """Safetensors file: teacher backbone and heads."""
    checkpoints_uri: str
    """Directory of resumable checkpoints."""
    teacher: TeacherConfig
    """How to run the weights."""
    step: int = Field(ge=0)
    """Optimizer steps taken."""
    final_losses: dict[str, float]
    """Losses of the last step, by name."""
    images_per_second: float
    """Mean training throughput over all ranks."""

    @property
    def numbers(self) -> dict[str, float]:
        """Losses of the last step, throughput and steps."""
        losses = {f"loss/{name}": value for name, value in self.final_losses.items()}
        return {**losses, "images_per_second": self.images_per_second, "step": float(self.step)}

    @property
    def headline(self) -> str:
        """How long and how fast it was trained, with the last losses."""
        losses = ", ".join(f"{name} {value:.3f}" for name, value in self.final_losses.items())
        return (
            f"{self.step} steps at {self.teacher.image_size_pixels} px, "
            f"{self.images_per_second:.0f} images/s; {losses}"
        )


class EvaluationReport(Manifest):
    """What the teacher's features are worth."""

    kind: Literal["evaluation"] = "evaluation"
    metrics: dict[str, float]
    """Name such as `SET/knn_top1` to value; baselines end in `_untrained` or `_pixels`."""
    evaluation_sha256: str
    """Digest of the evaluation sets and of how they were measured."""
    pictures: tuple[str, ...]
    """PNG files."""

    @property
    def numbers(self) -> dict[str, float]:
        """The metrics."""
        return dict(self.metrics)

    @property
    def headline(self) -> str:
        """Each accuracy beside its baselines; all metrics without labelled sets."""
        lines = []
        for name, value in self.metrics.items():
            untrained = self.metrics.get(f"{name}_untrained")
            pixels = self.metrics.get(f"{name}_pixels")
            if untrained is not None and pixels is not None:
                baselines = f"untrained {untrained:.1%}, raw pixels {pixels:.1%}"
                lines.append(f"{name} {value:.1%} ({baselines})")
        return "\n".join(lines) or super().headline


class Registration(Manifest):
    """The registered model version and how its alias was decided."""

    kind: Literal["registration"] = "registration"
    model_name: str
    """Registered model."""
    model_version: int = Field(ge=1)
    """Version of it."""
    alias: str
    """Alias that the gate gave."""
    decision: str
    """Why, in a sentence with the numbers."""
    tracking_uri: str
    """Tracking server or store that holds it."""

    @property
    def numbers(self) -> dict[str, float]:
        """The version."""
        return {"model_version": float(self.model_version)}

    @property
    def headline(self) -> str:
        """The version, its alias and why."""
        return f"version {self.model_version} is {self.alias}: {self.decision}"
