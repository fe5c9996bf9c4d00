"""The golden pipeline: `python -m tests.golden.compiled` writes it anew."""

from __future__ import annotations

import tempfile
from pathlib import Path

from k8s.placement import Volume
from pipelines.graph.dinov2 import compile_pipeline
from pipelines.spec.pipeline_spec import load_spec
from tests.pipelines.specs import demo_values, write_spec

GOLDEN = Path(__file__).parent / "pipeline.yaml"
CONTEXT = '{"workdir":"/mnt/dinopipe"}'
VOLUME = Volume(claim="dinopipe-work", mount_path="/mnt/dinopipe")


def portable_spec(folder: Path) -> Path:
    """The demo's spec on places that are the same on every machine."""
    values = demo_values()
    values["images"] = {
        "uri": "s3://bucket/pile",
        "synthetic_defects": values["images"]["synthetic_defects"],
    }
    values["evaluation_sets"][0].update(train="s3://bucket/train", test="s3://bucket/test")
    return write_spec(values, folder / "spec.yaml")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        spec = load_spec(portable_spec(Path(folder)))
        compile_pipeline(spec, context=CONTEXT, path=GOLDEN, volume=VOLUME)
