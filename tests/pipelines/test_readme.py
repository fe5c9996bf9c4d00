"""What the README tells people to type is what the program takes."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import yaml

from pipelines.__main__ import command_parser
from pipelines.spec.pipeline_spec import load_spec
from tests.pipelines.specs import REPOSITORY, small_values, write_spec

README = (REPOSITORY / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    """Fenced blocks of one language."""
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


COMMANDS = [
    line for block in blocks("sh") for line in block.splitlines() if line.startswith("dinopipe ")
]


def test_there_are_commands() -> None:
    assert len(COMMANDS) >= 7


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_are_taken(line: str) -> None:
    _, *arguments = shlex.split(line, comments=True)
    assert callable(command_parser().parse_args(arguments).command)


def test_the_way_to_a_schedule_has_at_most_eight_commands() -> None:
    (cluster,) = (block for block in blocks("sh") if "kubectl apply" in block)
    assert 1 < len(cluster.splitlines()) <= 8


def test_the_settings_for_a_cluster_are_right(tmp_path: Path) -> None:
    (text,) = blocks("yaml")
    settings = yaml.safe_load(
        text.replace("sha256:...", f"sha256:{'0' * 64}").replace("REGISTRY", "r.example")
    )
    spec = load_spec(write_spec(small_values("s3://bucket/pile") | settings, tmp_path / "s.yaml"))
    assert spec.placement.launcher.kind == "trainjob"
    assert spec.schedule is not None


@pytest.mark.parametrize(
    "path", re.findall(r"`((?:pipelines|k8s|components|dinov2_core)/[\w./-]+)`", README)
)
def test_paths_exist(path: str) -> None:
    assert (REPOSITORY / path).exists()
