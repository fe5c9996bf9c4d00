"""Settings of the curation stage."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import AliasChoices, Field, model_validator

from components.local_paths import LocalPath
from components.ranks.config import Topology
from dinov2_core.config.curation import (
    AlignmentVerification,
    SyntheticDefects,
    Verification,
    warn_of_old_name,
)
from dinov2_core.config.frozen import Frozen


class Images(Frozen):
    """The source images."""

    uri: LocalPath = Field(min_length=1)
    """A folder, a glob pattern, a Parquet file with a column `image`, or an s3:// prefix."""
    synthetic_defects: SyntheticDefects | None = Field(
        None, validation_alias=AliasChoices("synthetic_defects", "planted")
    )
    """Adds known defects and reports how many were found; null uses the images as they are."""

    @model_validator(mode="before")
    @classmethod
    def _old_name(cls, values: object) -> object:
        if isinstance(values, dict) and "planted" in values and "synthetic_defects" not in values:
            warn_of_old_name("images.planted", new="images.synthetic_defects")
        return values


class PixelEmbedding(Frozen):
    """Embeds by pixels and gradients: no weights, no network."""

    kind: Literal["pixels"] = "pixels"

    @property
    def weights_file(self) -> str:
        """None."""
        return ""


class TimmEmbedding(Frozen):
    """Embeds with a model of timm."""

    kind: Literal["timm"] = "timm"
    name: str
    """Model name, such as `vit_small_patch14_dinov2.lvd142m`."""
    weights: LocalPath | None = None
    """Local file with the weights; null downloads the published ones."""
    size_pixels: int = Field(224, ge=8)
    """Side to which images are resized."""

    @property
    def weights_file(self) -> str:
        """Local file; empty for published weights."""
        return self.weights or ""


class TorchScriptEmbedding(Frozen):
    """Embeds with a TorchScript file, such as SSCD's."""

    kind: Literal["torchscript"] = "torchscript"
    path: LocalPath
    """Local TorchScript file."""
    size_pixels: int = Field(288, ge=8)
    """Side to which images are resized."""

    @property
    def weights_file(self) -> str:
        """Local file."""
        return self.path


Embedding = Annotated[
    PixelEmbedding | TimmEmbedding | TorchScriptEmbedding, Field(discriminator="kind")
]


class SeedRetrieval(Frozen):
    """Keeps only the neighbours of a seed set, sample-based retrieval of arXiv:2304.07193."""

    uri: LocalPath
    """Seed images: a folder, a glob pattern, a Parquet file or an s3:// prefix."""
    num_neighbours: int = Field(4, ge=1)
    """Images kept for each seed image; the paper takes 4 for large sets, 32 for small."""


class CurateSettings(Frozen):
    """Which images are kept, and how they are stored."""

    min_side_pixels: int = Field(16, ge=1)
    """Images with a shorter side are dropped."""
    embedding: Embedding = PixelEmbedding()
    """Vectors that similar images are found by."""
    embedding_topology: Topology | None = None
    """Processes that scan and embed the images, each some blocks of them. When null, or for a
    single process on this machine, the stage's own process does; the result is the same."""
    verification: Verification = AlignmentVerification()
    """Decides whether two similar images are copies."""
    seed_retrieval: SeedRetrieval | None = None
    """Keeps only what resembles seed images; null keeps every distinct image."""
    shard_size_bytes: int = Field(256 * 2**20, ge=2**16)
    """Size at which a shard is closed."""
    num_threads: int = Field(2, ge=1)
    """Files that the stage's own process scans at the same time."""

    def embeds_on_ranks(self, *, on_cluster: bool) -> bool:
        """Whether other processes than the stage's own embed.

        Args:
            on_cluster: Whether they would have pods of their own; then a network gets one even for
                a single process, so that the pod of the stage needs no GPU.
        """
        topology, is_network = self.embedding_topology, self.embedding.kind != "pixels"
        return topology is not None and (topology.world_size > 1 or (on_cluster and is_network))

    @model_validator(mode="after")
    def _ranks_hold_whole_networks(self) -> Self:
        replicas = self.embedding_topology.num_replicas if self.embedding_topology else 1
        if replicas > 1:
            raise ValueError(
                f"embedding_topology.num_replicas {replicas} has no effect: every rank that embeds "
                "holds the whole network; leave it out"
            )
        return self


class CurateStage(Frozen):
    """From source images to a curated data set."""

    images: Images
    """The source images."""
    evaluation_images: tuple[str, ...] = ()
    """Sets whose images, and all that are too similar to them, must not be trained on."""
    settings: CurateSettings = CurateSettings()
    """Settings of the stage."""
