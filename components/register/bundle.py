"""The code that a registered model carries: its own file and copies of the core that it needs."""

from __future__ import annotations

import ast
import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

import dinov2_core

CORE = "dinov2_core"
MODEL_FILE = Path(__file__).parent / "teacher_model.py"
IMPORT = re.compile(rf"^(\s*)from {CORE}\.", re.MULTILINE)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCode:
    """Files that MLflow copies into a model version."""

    model: Path
    """What MLflow runs to load the model."""
    package: Path
    """Directory of the package that it imports."""


def write_model_code(directory: Path) -> ModelCode:
    """Write the registered model's file and the core modules that it needs.

    The modules become a package named by the digest of the sources, and every import of the core
    names that package instead: a process may hold this project, and other versions of the model,
    beside it.

    Args:
        directory: Gets one file and one package.
    """
    sources = core_sources(MODEL_FILE)
    model = MODEL_FILE.read_text(encoding="utf-8")
    digest = hashlib.sha256("\0".join([model, *sources, *sources.values()]).encode()).hexdigest()
    package = directory / f"dinopipe_teacher_{digest[:16]}"
    for name, source in sources.items():
        path = package / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(_renamed(source, package=package.name), encoding="utf-8")
    path = directory / MODEL_FILE.name
    path.write_text(_renamed(model, package=package.name), encoding="utf-8")
    return ModelCode(model=path, package=package)


def core_sources(file: Path) -> dict[str, str]:
    """Text of every core module that a file needs, by its path within the core."""
    root = Path(dinov2_core.__file__).parent
    sources: dict[str, str] = {}
    waiting = imported_modules(file.read_text(encoding="utf-8"))
    while waiting:
        parts = waiting.pop().split(".")
        if parts[0] != CORE:
            continue
        name = str(Path(*parts[1:]).with_suffix(".py"))
        if name in sources:
            continue
        sources[name] = (root / name).read_text(encoding="utf-8")
        waiting |= imported_modules(sources[name])
        for depth in range(1, len(parts)):
            sources[str(Path(*parts[1:depth], "__init__.py"))] = ""  # as the core's own are
    return dict(sorted(sources.items()))


def imported_modules(source: str) -> set[str]:
    """Absolute names of the modules that a source imports anywhere."""
    modules: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            modules.add(node.module or "")
    return modules


def _renamed(source: str, *, package: str) -> str:
    """A source whose imports of the core name a package instead."""
    renamed = IMPORT.sub(rf"\1from {package}.", source)
    left = [name for name in imported_modules(renamed) if name.split(".")[0] == CORE]
    assert not left, f"write `from {CORE}.MODULE import NAME` instead of importing {left}"
    return renamed
