from __future__ import annotations

from typing import Self

import pytest
from pydantic import ValidationError, model_validator

from dinov2_core.config.frozen import Frozen
from dinov2_core.errors import ExitCode, exit_code_of, shows_traceback
from pipelines.spec.problems import FoundProblems, Problem, SpecError, problems_of


def test_a_long_value_is_cut() -> None:
    text = str(Problem(path="a.b", value="x" * 200, message="is too long"))
    assert len(text) < 100
    assert text.startswith("a.b: 'xxx")


def test_a_mapping_is_not_printed() -> None:
    assert str(Problem(path="a", value={"k": 1}, message="is odd")) == "a: is odd"


def test_the_user_can_fix_a_spec() -> None:
    error = SpecError([Problem(path="a", value=1, message="is odd")])
    assert exit_code_of(error) == ExitCode.USER_ERROR
    assert not shows_traceback(error)


class Settings(Frozen):
    first: int
    second: int = 0

    @model_validator(mode="after")
    def _fit(self) -> Self:
        raise FoundProblems(
            [
                Problem(path="first", value=self.first, message="is odd"),
                Problem(path="second", value=self.second, message="is even"),
            ]
        )


def test_a_validator_reports_several_problems_at_once() -> None:
    with pytest.raises(ValidationError) as caught:
        Settings.model_validate_json('{"first": 1}')
    found = problems_of(caught.value, model=Settings, values={"first": 1})
    assert [str(problem) for problem in found] == ["first: 1 is odd", "second: 0 is even"]


def test_a_key_that_is_close_to_a_known_one_is_proposed() -> None:
    values = {"firs": 1}
    with pytest.raises(ValidationError) as caught:
        Settings.model_validate_json('{"firs": 1}')
    texts = {str(problem) for problem in problems_of(caught.value, model=Settings, values=values)}
    assert texts == {
        "first: is missing; this key is required",
        "firs: 1 belongs to an unknown key; did you mean first?",
    }
