"""Settings of the curation stage."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from components.local_paths import LocalPath
from components.ranks.config import Topology
from dinov2_core.config.frozen import Frozen


class Planted(Frozen):
    """Known defects that are put into a copy of the pile, to measure how many curation finds."""

    exact_copies: int = Field(0, ge=0)
    """Byte-identical copies."""
    near_copies: int = Field(0, ge=0)
    """Re-encoded, resized and cropped copies."""
    leaks: int = Field(0, ge=0)
    """Copies of evaluation images."""
    corrupt: int = Field(0, ge=0)
    """Truncated, empty, tiny and non-image files."""
    seed: int = Field(0, ge=0)
    """Of the choice of images and changes."""


class Images(Frozen):
    """The pile."""

    uri: LocalPath = Field(min_length=1)
    """A folder, a glob pattern, a Parquet file with a column `image`, or an s3:// prefix."""
    planted: Planted | None = None
    """Plants known defects and reports how many were found; leave out to use the pile as it is."""


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
    """Local file with the weights; null takes the published ones (needs the network once)."""
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
    """The file."""
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
    """Pile images taken for each seed image; the paper takes 4 for large sets, 32 for small."""


class EmbeddingDecides(Frozen):
    """Two images are copies if their embeddings are; for embedders made for that, such as SSCD."""

    kind: Literal["embedding"] = "embedding"
    near_threshold: float = Field(0.6, gt=0, le=1)
    """Cosine from which two images are copies; arXiv:2304.07193 with SSCD."""
    leak_threshold: float = Field(0.45, gt=0, le=1)
    """Cosine to an evaluation image from which an image is dropped; the same source."""
    num_neighbours: int = Field(64, ge=1)
    """Neighbours looked at for each image; the same source."""


class RegistrationDecides(Frozen):
    """Embeddings propose pairs; two images are copies if one, slightly cropped, lies on the other.

    The defaults were measured with copies planted in 10,000 product photographs.
    """

    kind: Literal["registration"] = "registration"
    candidate_threshold: float = Field(0.85, gt=0, le=1)
    """Whitened cosine of a coarse alignment from which a pair is aligned exactly."""
    near_threshold: float = Field(0.98, gt=0, le=1)
    """Whitened cosine of aligned pixels from which two images are copies."""
    leak_threshold: float = Field(0.97, gt=0, le=1)
    """The same for an evaluation image; lower, because a leak costs more than an image."""
    num_proposals: int = Field(4, ge=1)
    """Neighbours by embedding that are aligned for each image."""


Verification = Annotated[EmbeddingDecides | RegistrationDecides, Field(discriminator="kind")]


class CurateSettings(Frozen):
    """How a pile becomes a data set."""

    min_side_pixels: int = Field(16, ge=1)
    """Images with a shorter side are set aside."""
    embedding: Embedding = PixelEmbedding()
    """How images are compared."""
    embedding_topology: Topology | None = None
    """Processes that look at the images and embed them, each some blocks of the pile. When null,
    or for a single process on this machine, the stage does it by itself; the result is the same."""
    verification: Verification = RegistrationDecides()
    """Who has the last word on whether two images are copies."""
    seed_retrieval: SeedRetrieval | None = None
    """Left out when null: everything distinct is kept."""
    shard_size_bytes: int = Field(256 * 2**20, ge=2**16)
    """Size at which a shard is closed."""
    num_threads: int = Field(2, ge=1)
    """Files looked at at the same time by the stage itself."""

    def embeds_on_ranks(self, *, on_cluster: bool) -> bool:
        """Whether other processes than the stage's own embed.

        Args:
            on_cluster: Whether they would have pods of their own; then a network gets one even
                for a single process, so that the stage itself needs no GPU.
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
    """From a pile of images to a curated data set."""

    images: Images
    """The pile."""
    evaluation_images: tuple[str, ...] = ()
    """Sets whose images, and all that is too close to them, must not be trained on."""
    settings: CurateSettings = CurateSettings()
    """How."""

    @model_validator(mode="after")
    def _leaks_have_a_source(self) -> Self:
        planted = self.images.planted
        if planted is not None and planted.leaks and not self.evaluation_images:
            raise ValueError(
                f"images.planted.leaks is {planted.leaks} but there is no evaluation set to leak "
                f"from; set it to 0 or name an evaluation set"
            )
        return self
