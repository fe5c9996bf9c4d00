"""The house seen from outside: sizes, names, places."""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
PACKAGES = ("components", "dinov2_core", "k8s", "pipelines")
SOURCES = sorted(path for package in PACKAGES for path in (REPOSITORY / package).rglob("*.py"))
TOP_LEVEL = {
    ".ci", ".dockerignore", ".editorconfig", ".gitignore", "CHANGELOG.md", "CONTRIBUTING.md",
    "Dockerfile", "LICENSE", "Makefile", "README.md", "components", "dinov2_core", "k8s",
    "pipelines", "pyproject.toml", "tests",
}  # fmt: skip


def test_files_stay_under_400_lines() -> None:
    long = {
        str(path.relative_to(REPOSITORY)): lines
        for path in SOURCES
        if (lines := len(path.read_text().splitlines())) > 400
    }
    assert not long


def test_functions_stay_under_61_lines() -> None:
    long = [
        f"{path.relative_to(REPOSITORY)}:{node.lineno} {node.name}"
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef)
        and node.end_lineno is not None
        and node.end_lineno - node.body[0].lineno >= 60
    ]
    assert not long


def test_no_file_is_named_for_nothing() -> None:
    vague = re.compile(r"^(utils?|helpers?|common|misc|base|tools?|shared)$")
    assert not [path for path in SOURCES if vague.match(path.stem)]


def test_init_files_are_empty() -> None:
    assert not [path for path in SOURCES if path.name == "__init__.py" and path.read_text()]


def test_top_level_is_what_was_agreed() -> None:
    listed = subprocess.run(
        ["git", "ls-files"], cwd=REPOSITORY, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert {name.split("/")[0] for name in listed} <= TOP_LEVEL


def test_every_source_file_has_its_test() -> None:
    """A test file mirrors each module that has behaviour: not declarations, not a few lines."""
    exempt = {"__init__", "__main__", "component", "config"}
    missing = []
    for path in SOURCES:
        relative = path.relative_to(REPOSITORY)
        is_short = len(path.read_text().splitlines()) < 40
        if path.stem in exempt or "config" in relative.parts or is_short:
            continue
        if not (REPOSITORY / "tests" / relative.parent / f"test_{path.name}").exists():
            missing.append(str(relative))
    assert not missing
