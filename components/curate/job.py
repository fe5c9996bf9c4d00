"""The job of ranks that scan and embed images, and the blocks that they save."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import pyarrow as pa
import pyarrow.parquet as parquet
from pydantic import Field

from components.curate.config import CurateSettings
from components.ranks.config import Topology
from components.ranks.job import RanksJob
from components.runtime.storage import join_uri, list_names
from dinov2_core.config.frozen import Frozen
from dinov2_core.curation.image_files import ImageFiles
from dinov2_core.curation.scanning import blocks
from dinov2_core.errors import InputError

SCANS = "scans"
"""Directory of the blocks in that of the stage."""

Role = Literal["source", "evaluation", "seeds"]


class ImageSet(Frozen):
    """Images that are scanned."""

    role: Role
    """What they are used for."""
    uris: tuple[str, ...]
    """Sources that all nodes can read."""
    num_files: int = Field(ge=0)
    """Files in them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """Files that one rank scans together."""

    role: Role
    """Set that they are in."""
    numbers: range
    """Files of the set."""
    name: str
    """File of the result in the directory of the blocks."""


class EmbeddingJob(RanksJob):
    """Everything that a rank which embeds needs."""

    worker: ClassVar[str] = "components.curate.worker"
    work: ClassVar[str] = "embedding"

    stage_name: Literal["curate"] = "curate"
    """Stage that the images are embedded for."""
    settings: CurateSettings
    """How images are embedded, and on how many processes."""
    sets: tuple[ImageSet, ...]
    """All images."""

    @property
    def topology(self) -> Topology:
        """Ranks and nodes."""
        return self.settings.embedding_topology or Topology()

    @property
    def scans(self) -> str:
        """URI of the blocks' directory."""
        return join_uri(self.directory, SCANS)

    def path_of(self, block: Block) -> Path:
        """File of a block on this node."""
        return self.root / SCANS / block.name

    def blocks(self, role: Role | None = None) -> list[Block]:
        """All blocks, or those of one set; ranks take them in turn."""
        return [
            Block(role=one.role, numbers=numbers, name=f"{one.role}/{count:08d}.parquet")
            for one in self.sets
            if role in (None, one.role)
            for count, numbers in enumerate(blocks(one.num_files))
        ]

    def finished_blocks(self) -> set[str]:
        """Names of the blocks that are saved, by whatever attempt."""
        return set(list_names(self.scans))

    def is_finished(self) -> bool:
        """Whether all blocks are saved."""
        return self.finished_blocks() >= {block.name for block in self.blocks()}

    def progress_description(self) -> str:
        """Number of saved blocks, which another attempt keeps."""
        return f"after {len(self.finished_blocks())} of {len(self.blocks())} blocks of images"


def read_blocks(job: EmbeddingJob, role: Role, files: ImageFiles) -> Iterator[pa.Table]:
    """Results of the ranks for a set, block by block, from this node's disk.

    Raises:
        InputError: They scanned other files.
    """
    for block in job.blocks(role):
        table = parquet.read_table(job.path_of(block))
        if table["name"].to_pylist() != [files.name(number) for number in block.numbers]:
            raise InputError(
                f"files of the {role} images were added, removed or renamed while they were "
                "embedded; start again when they no longer change"
            )
        yield table
