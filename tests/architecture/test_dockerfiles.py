"""What images are made of is named so that it stays the same."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
STAGES = REPOSITORY / "Dockerfile"
MLFLOW = REPOSITORY / "k8s" / "components" / "mlflow" / "Dockerfile"
PINNED = re.compile(r"[\w./-]+:[\w.-]+@sha256:[0-9a-f]{64}")


def found(pattern: str, path: Path) -> list[str]:
    return re.findall(pattern, path.read_text(encoding="utf-8"), flags=re.MULTILINE)


@pytest.mark.parametrize("path", [STAGES, MLFLOW])
def test_every_image_starts_from_a_digest(path: Path) -> None:
    names = set(found(r"^ARG (\w*BASE)=", path))
    for base in found(r"^ARG \w*BASE=(.*)$", path):
        assert PINNED.fullmatch(base), base
    known = {*found(r"^FROM \S+ AS (\S+)$", path), "base-${VARIANT}"}
    starts = set(found(r"^FROM (\S+)", path))
    assert starts - known == {f"${{{name}}}" for name in names}


def test_a_variant_is_one_of_two_stages() -> None:
    variants = {name for name in found(r"^FROM \S+ AS (\S+)$", STAGES) if name.startswith("base-")}
    assert variants == {"base-cpu", "base-cuda"}
    assert f"base-{found(r'^ARG VARIANT=(.*)$', STAGES)[0]}" in variants


def test_packages_are_named_with_their_version() -> None:
    packages = found(r"(?<=\bpip install )[^&|\n]*", MLFLOW)[0].split()
    assert len(packages) == 3
    assert all(re.fullmatch(r'"?[\w\[\]-]+==[\d.]+"?', package) for package in packages), packages
