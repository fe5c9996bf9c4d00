"""What the ranks that embed are told, and the blocks that they leave."""

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
from dinov2_core.curation.looking import blocks
from dinov2_core.curation.sources import ImageFiles

LOOKS = "looks"
"""Name of the blocks' directory in that of the stage."""

Role = Literal["pile", "evaluation", "seeds"]


class ImageSet(Frozen):
    """Images that are looked at."""

    role: Role
    """What they are for."""
    places: tuple[str, ...]
    """Where all nodes find them."""
    num_files: int = Field(ge=0)
    """Files there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """Files that one rank looks at together."""

    role: Role
    """Set that they are of."""
    numbers: range
    """Files of the set."""
    name: str
    """File below the blocks' directory that tells what was seen."""


class EmbeddingJob(RanksJob):
    """Everything that a rank which embeds needs."""

    worker: ClassVar[str] = "components.curate.worker"
    work: ClassVar[str] = "embedding"

    phase: Literal["curate"] = "curate"
    """Stage that the images are embedded for."""
    settings: CurateSettings
    """How images are looked at, and on how many processes."""
    sets: tuple[ImageSet, ...]
    """All images."""

    @property
    def topology(self) -> Topology:
        """How many ranks embed, and where."""
        return self.settings.embedding_topology or Topology()

    @property
    def looks(self) -> str:
        """Place of the blocks."""
        return join_uri(self.directory, LOOKS)

    def path_of(self, block: Block) -> Path:
        """File of a block on this node."""
        return self.root / LOOKS / block.name

    def blocks(self, role: Role | None = None) -> list[Block]:
        """All blocks, or those of one set; ranks take them in turn."""
        return [
            Block(role=one.role, numbers=numbers, name=f"{one.role}/{count:08d}.parquet")
            for one in self.sets
            if role in (None, one.role)
            for count, numbers in enumerate(blocks(one.num_files))
        ]

    def finished_blocks(self) -> set[str]:
        """Names of the blocks that are there, whoever made them."""
        return set(list_names(self.looks))

    def is_finished(self) -> bool:
        """Whether all blocks are there."""
        return self.finished_blocks() >= {block.name for block in self.blocks()}

    def progress_description(self) -> str:
        """Blocks that are there; they stay."""
        return f"after {len(self.finished_blocks())} of {len(self.blocks())} blocks of images"


def read_blocks(job: EmbeddingJob, role: Role, files: ImageFiles) -> Iterator[pa.Table]:
    """What the ranks saw of a set, block by block, from this node's disk.

    Raises:
        ValueError: They saw other files.
    """
    for block in job.blocks(role):
        table = parquet.read_table(job.path_of(block))
        if table["name"].to_pylist() != [files.name(number) for number in block.numbers]:
            raise ValueError(
                f"{role}: files were added, removed or renamed while they were embedded; start "
                "again when nobody changes them"
            )
        yield table
