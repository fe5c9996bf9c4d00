"""Settings that name files of this machine: marked where they are declared, found in any tree."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, TypeVar, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo

Settings = TypeVar("Settings", bound=BaseModel)


class _Marker:
    """Marks a setting that may name a file, a folder or a glob pattern of this machine."""


LOCAL_PATH = _Marker()
LocalPath = Annotated[str, LOCAL_PATH]
"""A setting with this type may also hold an address, such as s3://BUCKET/KEY or timm:NAME."""


def is_local(path: str) -> bool:
    """Whether a setting names something on this machine, not an address and not nothing."""
    return bool(path) and "://" not in path and not path.startswith(("timm:", "models:/"))


def local_paths(settings: BaseModel) -> dict[str, str]:
    """Every path on this machine that a tree of settings names, by dotted key."""
    found: dict[str, str] = {}

    def note(key: str, path: str) -> str:
        found[key] = path
        return path

    _changed(settings, note, key="")
    return found


def with_absolute_paths(settings: Settings, *, folder: Path) -> Settings:
    """The same settings with relative paths taken from a folder."""

    def absolute(_key: str, path: str) -> str:
        return path if Path(path).is_absolute() else str((folder / path).resolve())

    changed = _changed(settings, absolute, key="")
    assert isinstance(changed, type(settings))
    return changed


def _changed(value: object, change: Callable[[str, str], str], *, key: str) -> object:
    """A tree of settings with `change` applied to the key and text of every local path."""
    if isinstance(value, BaseModel):
        updates = {}
        for name, field in type(value).model_fields.items():
            old, own_key = getattr(value, name), f"{key}.{name}".lstrip(".")
            if _is_marked(field):
                new = change(own_key, old) if old is not None and is_local(old) else old
            else:
                new = _changed(old, change, key=own_key)
            if new is not old:
                updates[name] = new
        return value.model_copy(update=updates) if updates else value
    if isinstance(value, tuple):
        items = tuple(_changed(item, change, key=f"{key}.{i}") for i, item in enumerate(value))
        return items if any(a is not b for a, b in zip(items, value, strict=True)) else value
    return value


def _is_marked(field: FieldInfo) -> bool:
    members = get_args(field.annotation)  # of `LocalPath | None`
    marks = [getattr(member, "__metadata__", ()) for member in members]
    return any(LOCAL_PATH in found for found in (field.metadata, *marks))
