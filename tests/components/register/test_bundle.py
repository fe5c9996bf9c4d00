"""bundle: what a registered model carries is little, its own, and found without this project."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

from components.register import bundle
from components.register.bundle import MODEL_FILE, core_sources, imported_modules, write_model_code

LIBRARIES = {"torch", "numpy", "PIL"}


def test_the_carried_core_imports_torch_numpy_and_pillow_alone() -> None:
    sources = core_sources(MODEL_FILE)
    imported = set().union(*map(imported_modules, sources.values()))
    top_levels = {name.partition(".")[0] for name in imported} - sys.stdlib_module_names
    assert top_levels == {"dinov2_core", *LIBRARIES}
    modules = {"dinov2_core." + name.removesuffix(".py").replace("/", ".") for name in sources}
    assert {name for name in imported if name.startswith("dinov2_core")} <= modules
    assert "dinov2_core.vit.transformer" in modules
    trained_only = ("config", "distributed", "losses", "training", "vit.attention_kernels")
    assert not [
        name for name in modules if name.startswith(tuple(f"dinov2_core.{n}" for n in trained_only))
    ]


def test_the_carried_package_has_a_name_of_its_own_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, again = write_model_code(tmp_path / "a"), write_model_code(tmp_path / "b")
    assert first.package.name == again.package.name
    assert list(core_sources(MODEL_FILE)) == sorted(core_sources(MODEL_FILE))
    changed = tmp_path / "teacher_model.py"
    changed.write_text(MODEL_FILE.read_text() + "CHANGED = 1\n")
    monkeypatch.setattr(bundle, "MODEL_FILE", changed)
    assert write_model_code(tmp_path / "c").package.name != first.package.name


def test_no_file_of_it_imports_this_project(tmp_path: Path) -> None:
    code = write_model_code(tmp_path)
    own = {"dinov2_core", "components", "pipelines", "k8s"}
    for path in tmp_path.rglob("*.py"):
        source = path.read_text()
        assert not {name.partition(".")[0] for name in imported_modules(source)} & own, path
        ast.parse(source)
    assert (code.package / "vit" / "__init__.py").exists()
    assert f"from {code.package.name}.evaluation.embedder import" in code.model.read_text()


def test_an_import_that_cannot_be_renamed_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "teacher_model.py"
    other.write_text("import dinov2_core.device_kind\n")
    monkeypatch.setattr(bundle, "MODEL_FILE", other)
    with pytest.raises(AssertionError, match="instead of importing"):
        write_model_code(tmp_path / "code")
