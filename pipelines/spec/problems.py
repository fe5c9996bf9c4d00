"""What is wrong with a spec: path, value and remedy of every mistake."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from dinov2_core.errors import SettingsError

PASSWORD = re.compile(r"//[^/@\s]*@")


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One mistake in a spec."""

    path: str
    """Dotted path in the spec; empty for the whole file."""
    value: object
    """What the file has there; None if nothing, or if it must not be shown."""
    message: str
    """What is wrong with it and what would be right."""

    def __str__(self) -> str:
        where = self.path or "spec"
        if self.value is None or isinstance(self.value, dict):
            return f"{where}: {self.message}"
        shown = PASSWORD.sub("//***@", repr(self.value))
        shown = shown if len(shown) <= 60 else shown[:57] + "..."
        return f"{where}: {shown} {self.message}"


class SpecError(SettingsError):
    """A spec that cannot be used; lists every problem."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(str(problem) for problem in self.problems))


class FoundProblems(ValueError):
    """Carries problems out of a validator of pydantic, which takes no other exceptions."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        super().__init__("\n".join(str(problem) for problem in problems))
        self.problems = tuple(problems)


def problems_of(error: ValidationError, *, model: type[BaseModel], values: object) -> list[Problem]:
    """Every problem of a failed validation, each once, by its path in the file.

    Args:
        error: Of the validation.
        model: What was validated; its keys are proposed where an unknown one is close.
        values: What the file has.
    """
    found: dict[str, Problem] = {}
    for detail in error.errors(include_url=False):
        inner = detail.get("ctx", {}).get("error")
        if isinstance(inner, FoundProblems):
            written = [_as_written(problem, values) for problem in inner.problems]
            found.update({problem.path: problem for problem in written})
            continue
        path = _path_within(detail["loc"], values)
        problem = Problem(
            path=".".join(path),
            value=_value(detail),
            message=_remedy(detail, key=path[-1] if path else "", model=model),
        )
        if problem.path in found and "expected" not in problem.message:
            continue
        found[problem.path] = problem
    return list(found.values())


def _as_written(problem: Problem, values: object) -> Problem:
    """The problem of a check across sections, under the old name of a key if the file has that."""
    images = values.get("images") if isinstance(values, dict) else None
    if not isinstance(images, dict) or "planted" not in images:
        return problem
    path = problem.path.replace("images.synthetic_defects", "images.planted")
    return replace(problem, path=path)


def _path_within(loc: Sequence[int | str], values: object) -> list[str]:
    """The part of a location that is in the file, without the union branches pydantic adds."""
    path: list[str] = []
    here = values
    for position, part in enumerate(loc):
        last = position == len(loc) - 1
        if isinstance(here, dict) and (part in here or last) and not _is_branch(part):
            here = here.get(part)
        elif isinstance(here, list) and isinstance(part, int) and part < len(here):
            here = here[part]
        else:
            continue
        path.append(str(part))
    return path


def _is_branch(part: int | str) -> bool:
    return isinstance(part, str) and (part[:1].isupper() or "[" in part)


def _value(detail: ErrorDetails) -> object:
    return None if detail["type"] == "missing" else detail["input"]


def _remedy(detail: ErrorDetails, *, key: str, model: type[BaseModel]) -> str:
    kind = detail["type"]
    context: dict[str, Any] = detail.get("ctx", {})
    if kind == "missing":
        return "is missing; this key is required"
    if kind == "extra_forbidden":
        known = sorted(_all_keys(model))
        close = difflib.get_close_matches(key, known, n=1)
        hint = f"did you mean {close[0]}?" if close else "remove it"
        return f"belongs to an unknown key; {hint}"
    if kind == "literal_error":
        expected = str(context.get("expected", ""))
        close = difflib.get_close_matches(
            str(detail["input"]), [word.strip("' ") for word in expected.split(",")], n=1
        )
        hint = f"; did you mean {close[0]}?" if close else ""
        return f"is not known; expected {expected}{hint}"
    if kind == "value_error":
        return str(context.get("error", detail["msg"])).removeprefix("Value error, ")
    if kind == "string_pattern_mismatch":
        return f"has characters that are not allowed here; it must match {context['pattern']}"
    return f"is wrong: {detail['msg'][0].lower()}{detail['msg'][1:]}"


def _all_keys(model: type[BaseModel]) -> set[str]:
    """Names of all settings of a model and of those within it."""
    keys: set[str] = set()
    waiting: list[object] = [model]
    seen: set[object] = set()
    while waiting:
        item = waiting.pop()
        if item in seen:
            continue
        seen.add(item)
        if isinstance(item, type) and issubclass(item, BaseModel):
            keys.update(item.model_fields)
            waiting.extend(field.annotation for field in item.model_fields.values())
        else:
            waiting.extend(get_args(item))
    return keys
