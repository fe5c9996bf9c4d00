"""A small spec on real images, cut from the demo's, for tests that run or compile one."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import yaml

REPOSITORY = Path(__file__).parents[2]
DEMO = REPOSITORY / "pipelines" / "specs" / "demo.yaml"


def demo_values() -> dict[str, Any]:
    values: dict[str, Any] = yaml.safe_load(DEMO.read_text())
    return values


def small_values(images: Path | str, **changes: Any) -> dict[str, Any]:
    """The demo made as small as it can be: a pile of its own, two dozen steps."""
    values = demo_values()
    values["images"] = {"uri": str(images)}
    values["evaluation_sets"] = []
    values["registry"] = {"model_name": "small-teacher"}
    learning = values["pretrain"]["learning"]
    learning["backbone"]["architecture"] = {"embed_dim": 32, "depth": 2, "num_heads": 2}
    for part in ("dino", "ibot"):
        learning[part]["head"].update(num_prototypes=64, bottleneck_dim=16, hidden_dim=32)
    learning["optimization"].update(num_steps=12, warmup_steps=2, global_batch_size=16)
    learning["checkpoints"] = {"every_steps": 4, "keep_last": 2}
    learning["teacher"]["temperature_warmup_steps"] = 4
    values["finetune"].update(num_steps=4, global_batch_size=8)
    return changed(values, changes)


def changed(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """A copy with dotted keys set; a value of ... removes the key."""
    values = copy.deepcopy(values)
    for path, value in changes.items():
        *parents, last = path.split("__")
        here = values
        for name in parents:
            here = here[name]
        if value is ...:
            del here[last]
        else:
            here[last] = value
    return values


def write_spec(values: dict[str, Any], path: Path) -> Path:
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path
