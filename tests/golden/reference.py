"""The reference's recorded steps, cut to what cannot be made again, as they lie in the repository.

Both recordings start from the same student, the teacher is its copy, and images are noise whose seed
is known. What is left of 29 MB: the initial student, masks, numbers of every step, and the smaller
tensors of the last state and of two steps' gradients.

`python -m tests.golden.reference RECORDING... -o FILE` cuts whole recordings.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FILE = Path(__file__).with_name("reference.pt")
NAMES = ("centering_shared", "sinkhorn_separate")
FIRST_IMAGE_SEED = 100
MAX_ELEMENTS = 4096
"""Larger tensors of the last state and of gradients are left out."""
CROPS = {"collated_global_crops": (2, 56), "collated_local_crops": (4, 28)}
"""Crops per image and side in pixels."""
NUM_IMAGES = 6


def read_reference(name: str) -> dict[str, Any]:
    """One recording in the format of the whole files.

    Raises:
        ValueError: This torch draws other noise than the one that recorded.
    """
    content = torch.load(FILE, weights_only=True)
    recording: dict[str, Any] = content["recordings"][name]
    student = {key: content["student"][key] for key in recording.pop("student_names")}
    recording["init"] |= student
    recording["init"] |= {key.replace("student.", "teacher.", 1): x for key, x in student.items()}
    for step, recorded in enumerate(recording["steps"]):
        images = noise(FIRST_IMAGE_SEED + step)
        for key, first in recorded.pop("first_values").items():
            if not torch.allclose(images[key].flatten()[: len(first)], first, atol=1e-6):
                raise ValueError(f"torch {torch.__version__} draws other numbers for step {step}")
        recorded["data"] |= images
    return recording


def noise(seed: int) -> dict[str, Tensor]:
    """The crops of one step: all of image 0, then all of image 1, collated crop by crop."""
    generator = torch.Generator().manual_seed(seed)
    drawn: dict[str, list[list[Tensor]]] = {name: [] for name in CROPS}
    for _ in range(NUM_IMAGES):
        for name, (count, side) in CROPS.items():
            crops = [torch.randn(3, side, side, generator=generator) for _ in range(count)]
            drawn[name].append(crops)
    return {
        name: torch.stack([crops[i] for i in range(count) for crops in drawn[name]])
        for name, (count, _) in CROPS.items()
    }


def cut(recordings: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What of whole recordings cannot be made again."""
    student: dict[str, Tensor] = {}
    kept = {}
    for name, recording in recordings.items():
        own = {key: x for key, x in recording["init"].items() if key.startswith("student.")}
        for key, value in own.items():
            assert torch.equal(student.setdefault(key, value), value), key
            assert torch.equal(recording["init"][key.replace("student.", "teacher.", 1)], value)
        steps = []
        for number, step in enumerate(recording["steps"]):
            images = noise(FIRST_IMAGE_SEED + number)
            assert all(torch.equal(step["data"][key], x) for key, x in images.items()), number
            data = {key: x for key, x in step["data"].items() if key not in images}
            first = {key: x.flatten()[:8].clone() for key, x in images.items()}
            grads = None if step["grads"] is None else small(step["grads"])
            steps.append({**step, "data": data, "first_values": first, "grads": grads})
        rest = {
            k: x for k, x in recording["init"].items() if not k.startswith(("student.", "teacher."))
        }
        kept[name] = {
            **recording,
            "init": rest,
            "student_names": list(own),
            "steps": steps,
            "final": small(recording["final"]),
        }
    return {"student": student, "recordings": kept}


def small(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors that are no larger than the limit, without what shares their storage."""
    return {key: x.clone() for key, x in tensors.items() if x.numel() <= MAX_ELEMENTS}


def main(argv: list[str] | None = None) -> int:
    """Cut whole recordings and write one file."""
    parser = argparse.ArgumentParser(prog="python -m tests.golden.reference", description=__doc__)
    parser.add_argument("files", type=Path, nargs="+", help="whole recordings")
    parser.add_argument("-o", "--output", type=Path, default=FILE)
    args = parser.parse_args(argv)
    whole = {path.stem: torch.load(path, weights_only=True) for path in args.files}
    torch.save(cut(whole), args.output)
    sys.stdout.write(f"wrote {args.output}, {args.output.stat().st_size:,} bytes\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
