"""Types of what Kubernetes accepts: names, labels, quantities and paths."""

from __future__ import annotations

import hashlib
import re
from pathlib import PurePosixPath
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict


class Values(BaseModel):
    """A value: fixed once validated, equal by content, closed to unknown keys."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


LABEL = r"[a-z0-9]([-a-z0-9]*[a-z0-9])?"
SUBDOMAIN = rf"{LABEL}(\.{LABEL})*"
WORD = r"[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?"
ACCELERATOR = (
    r"nvidia\.com/(gpu|gpu\.shared|mig-[0-9]+g\.[0-9]+gb(\.me)?)|amd\.com/gpu|habana\.ai/gaudi"
    r"|gpu\.intel\.com/(i915|xe)|google\.com/tpu|aws\.amazon\.com/neuron(core|device)?"
)
QUANTITY = r"[0-9]+(\.[0-9]+)?(m|k|M|G|T|P|E|Ki|Mi|Gi|Ti|Pi|Ei)?"


def _matching(pattern: str, *, longest: int, right: str) -> AfterValidator:
    """A check of a text against a pattern; pydantic adds the text to the message."""

    def check(text: str) -> str:
        if len(text) > longest or re.fullmatch(pattern, text) is None:
            raise ValueError(f"is not {right}")
        return text

    return AfterValidator(check)


DnsLabel = Annotated[
    str,
    _matching(
        LABEL, longest=63, right="a DNS label: at most 63 lower-case letters, digits and dashes"
    ),
]
"""Name of a namespace, queue or service account."""

DnsName = Annotated[
    str,
    _matching(
        SUBDOMAIN,
        longest=253,
        right="a DNS name: lower-case letters, digits, dashes and dots, at most 253",
    ),
]
"""Name of most other objects."""

LabelValue = Annotated[
    str,
    _matching(
        rf"({WORD})?",
        longest=63,
        right="a label value: at most 63 letters, digits, dashes, dots and underscores",
    ),
]
"""Value of a label; may be empty."""

Quantity = Annotated[
    str,
    _matching(QUANTITY, longest=30, right="a quantity of Kubernetes, such as 500m, 4 or 64Gi"),
]
"""Amount of a resource."""

AcceleratorName = Annotated[
    str,
    _matching(
        ACCELERATOR,
        longest=253,
        right="a resource of a known accelerator, such as nvidia.com/gpu or amd.com/gpu",
    ),
]
"""Resource name of an accelerator."""

RdmaName = Annotated[
    str,
    _matching(
        rf"(rdma|{LABEL}(\.{LABEL})+)/{WORD}",
        longest=253,
        right="an RDMA resource, such as rdma/ib or vpc.amazonaws.com/efa",
    ),
]
"""Resource name of an RDMA device."""

VariableName = Annotated[
    str,
    _matching(
        r"(?!PET_)[A-Z_][A-Z0-9_]*",
        longest=253,
        right="the name of an environment variable: capitals, digits and underscores, and none of "
        "PET_*, which Kubeflow Trainer sets",
    ),
]
"""Name of an environment variable."""


def _is_label_key(text: str) -> str:
    prefix, slash, name = text.rpartition("/")
    has_prefix = re.fullmatch(SUBDOMAIN, prefix) is not None and len(prefix) <= 253
    if len(name) > 63 or re.fullmatch(WORD, name) is None or (slash and not has_prefix):
        raise ValueError(f"{text!r} is not a label key, such as disktype or nvidia.com/gpu.product")
    return text


LabelKey = Annotated[str, AfterValidator(_is_label_key)]
"""Key of a label, with or without a DNS prefix."""


def _is_mount_path(text: str) -> str:
    path = PurePosixPath(text)
    if not path.is_absolute() or str(path) != text or text == "/" or ":" in text or ".." in text:
        raise ValueError(
            "is not a mount path: absolute, below /, without .. and :, such as /mnt/dinopipe"
        )
    return text


MountPath = Annotated[str, AfterValidator(_is_mount_path)]
"""Path at which a volume is mounted."""


def dns_label(*parts: str, longest: int = 63) -> str:
    """A DNS label of several parts, the same for the same parts.

    If characters have to be replaced or cut off, a digest keeps names of different parts different.
    """
    plain = "-".join(parts)
    name = re.sub(r"[^a-z0-9-]+", "-", plain.lower()).strip("-")
    if not name[:1].isalpha():  # a Service's name, made from it, must start with a letter
        name = f"j-{name}"
    if name == plain and len(name) <= longest:
        return name
    digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:8]
    return f"{name[: longest - 9].rstrip('-')}-{digest}"


def label_value(text: str) -> str:
    """A text as a label's value, with a digest if it has to be changed."""
    value = re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-._")
    if value == text and len(value) <= 63:
        return value
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    return f"{value[:54]}-{digest}".lstrip("-")
