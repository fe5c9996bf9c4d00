"""Commands that write, check and describe a spec."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dinov2_core.errors import SettingsError

if TYPE_CHECKING:
    from pipelines.spec.pipeline_spec import PipelineSpec

STARTER = Path(__file__).parent / "specs" / "starter.yaml"


def add_commands(commands: Any) -> None:
    """Add init, validate and schema."""
    init = commands.add_parser("init", help="write a commented starter spec")
    init.add_argument("spec", type=Path, nargs="?", default=Path("dinopipe.yaml"), help="new file")
    init.set_defaults(command=_init)
    validate = commands.add_parser("validate", help="check a spec without starting anything")
    validate.add_argument("spec", type=Path)
    validate.set_defaults(command=_validate)
    schema = commands.add_parser("schema", help="print the spec's JSON schema, for editors")
    schema.set_defaults(command=_schema)


def checked_spec(path: Path) -> PipelineSpec:
    """A spec that is right in itself and whose data, weights and servers exist.

    Raises:
        SpecError: It is not; the error lists every problem.
    """
    from pipelines.preflight import check_inputs
    from pipelines.spec.pipeline_spec import load_spec
    from pipelines.spec.problems import SpecError

    spec = load_spec(path)
    problems = check_inputs(spec)
    if problems:
        raise SpecError(problems)
    return spec


def _init(args: argparse.Namespace) -> int:
    text = STARTER.read_text(encoding="utf-8")
    try:
        with args.spec.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError as error:
        raise SettingsError(
            f"{args.spec} exists already; name another file, or remove it first"
        ) from error
    sys.stdout.write(
        f"wrote {args.spec}; set images.uri in it, then: dinopipe validate {args.spec}\n"
    )
    return 0


def _validate(args: argparse.Namespace) -> int:
    spec = checked_spec(args.spec)
    learning, topology = spec.pretrain.learning, spec.pretrain.topology
    sys.stdout.write(
        f"{args.spec} is right: {spec.name}, {learning.optimization.num_steps} + "
        f"{spec.finetune.num_steps} steps on {topology.world_size} ranks, "
        f"peak learning rate {learning.optimization.peak_learning_rate:.3g}\n"
    )
    return 0


def _schema(_: argparse.Namespace) -> int:
    from pipelines.spec.pipeline_spec import PipelineSpec

    sys.stdout.write(json.dumps(PipelineSpec.model_json_schema(), indent=2) + "\n")
    return 0
