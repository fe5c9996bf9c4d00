from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest
from pydantic import BaseModel

from components.local_paths import LocalPath, is_local, local_paths, with_absolute_paths
from dinov2_core.config.frozen import Frozen
from pipelines.spec.pipeline_spec import PipelineSpec


class Inner(Frozen):
    path: LocalPath | None = None
    name: str = "name"


class Outer(Frozen):
    uri: LocalPath = ""
    parts: tuple[Inner, ...] = ()
    other: Inner = Inner()


SETTINGS = Outer(
    uri="pile/*.jpg", parts=(Inner(path="a.pth"), Inner(path="/b.pth"), Inner(path="s3://b/c"))
)


def test_marked_settings_are_found_by_their_keys() -> None:
    assert local_paths(SETTINGS) == {
        "uri": "pile/*.jpg", "parts.0.path": "a.pth", "parts.1.path": "/b.pth"
    }  # fmt: skip


def test_relative_paths_are_taken_from_a_folder_and_nothing_else_changes(tmp_path: Path) -> None:
    rooted = with_absolute_paths(SETTINGS, folder=tmp_path)
    assert rooted == Outer(
        uri=f"{tmp_path}/pile/*.jpg",
        parts=(
            Inner(path=f"{tmp_path}/a.pth"),
            Inner(path="/b.pth"),
            Inner(path="s3://b/c"),
        ),
    )
    assert rooted.other is SETTINGS.other


@pytest.mark.parametrize("address", ["", "s3://b/k", "timm:vit.tag", "models:/m@champion"])
def test_addresses_are_no_paths(address: str) -> None:
    assert not is_local(address)


def settings_classes(model: type[BaseModel]) -> set[type[BaseModel]]:
    """A settings class with all that its fields hold."""
    found: set[type[BaseModel]] = set()
    waiting: list[object] = [model]
    while waiting:
        item = waiting.pop()
        if isinstance(item, type) and issubclass(item, BaseModel):
            if item not in found:
                found.add(item)
                waiting += [field.annotation for field in item.model_fields.values()]
        else:
            waiting += get_args(item)
    return found


def test_every_setting_of_a_spec_that_says_it_is_a_path_is_marked() -> None:
    """By its description: a new one must not be forgotten."""
    words = ("a folder", "local file", "the file", "images whose labels", "a file (")
    described = {
        f"{model.__name__}.{name}"
        for model in settings_classes(PipelineSpec)
        for name, field in model.model_fields.items()
        if any(word in (field.description or "").lower() for word in words)
    }
    marked = {
        f"{model.__name__}.{name}"
        for model in settings_classes(PipelineSpec)
        for name, field in model.model_fields.items()
        if "local_paths" in f"{field.metadata} {field.annotation}"
    }
    assert described - {"Images.planted"} <= marked
    assert len(marked) >= 9
