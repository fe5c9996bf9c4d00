"""Curation: what makes two images copies, and which defects are put in to measure it."""

from __future__ import annotations

import logging
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from dinov2_core.config.frozen import Frozen

_log = logging.getLogger(__name__)


class SyntheticDefects(Frozen):
    """Known defects that are added to a copy of the images, to measure how many curation finds."""

    exact_copies: int = Field(0, ge=0)
    """Byte-identical copies."""
    near_copies: int = Field(0, ge=0)
    """Re-encoded, resized and cropped copies."""
    leaks: int = Field(0, ge=0)
    """Copies of evaluation images."""
    corrupt: int = Field(0, ge=0)
    """Truncated, empty, tiny and non-image files."""
    seed: int = Field(0, ge=0)
    """Seed for the choice of images and changes."""


class EmbeddingVerification(Frozen):
    """Two images are copies if their embeddings are; for embedders made for that, such as SSCD."""

    kind: Literal["embedding"] = "embedding"
    near_threshold: float = Field(0.6, gt=0, le=1)
    """Cosine from which two images are copies; arXiv:2304.07193 with SSCD. Belongs to an embedder
    and a domain."""
    leak_threshold: float = Field(0.45, gt=0, le=1)
    """Cosine to an evaluation image from which an image is dropped; the same source."""
    num_neighbours: int = Field(64, ge=1)
    """Nearest neighbours compared for each image; the same source."""


class AlignmentVerification(Frozen):
    """Two images are copies if one, with up to 15 % cropped from a side, matches the other.

    Embeddings and an index of crops propose pairs, pixel alignment decides. The defaults were
    measured with copies added to 10,000 images of Fashion-MNIST, whose distinct images are
    unusually similar. Mirrored and rotated copies are not found.
    """

    kind: Literal["alignment"] = "alignment"
    candidate_threshold: float = Field(0.85, gt=0, le=1)
    """Whitened cosine of a coarse alignment from which a pair is aligned exactly; all but 1 in 150
    crops lay above."""
    near_threshold: float = Field(0.98, gt=0, le=1)
    """Whitened cosine of aligned pixels from which two images are copies. Above lay all JPEG and
    WebP copies of quality 60 to 95, 99 % of crops that leave 85 to 96 % of each side, 97 % of
    copies resized to 75 to 200 %; it cost 0.3 to 0.4 % of the distinct images. 0.97 finds 1 % more
    and costs 1.1 %."""
    leak_threshold: float = Field(0.97, gt=0, le=1)
    """The same for an evaluation image; lower, because a leak costs more than an image."""
    num_proposals: int = Field(4, ge=1)
    """Nearest neighbours by embedding that are aligned for each image, besides those of the index
    of crops."""


def warn_of_old_name(old: str, *, new: str) -> None:
    """Log that a spec uses a name which still works."""
    _log.warning("%s is an old name that still works; write %s", old, new)


def _with_current_kind(value: object) -> object:
    if isinstance(value, dict) and value.get("kind") == "registration":
        warn_of_old_name("curate.verification.kind: registration", new="alignment")
        return value | {"kind": "alignment"}
    return value


Verification = Annotated[
    EmbeddingVerification | AlignmentVerification,
    Field(discriminator="kind"),
    BeforeValidator(_with_current_kind),
]
