from __future__ import annotations

import pytest

from dinov2_core import errors
from dinov2_core.errors import DinopipeError, ExitCode, exit_code_of, shows_traceback

CLASSES = [
    item
    for item in vars(errors).values()
    if isinstance(item, type) and issubclass(item, DinopipeError)
]


def test_the_tree_in_the_docstring_is_the_tree() -> None:
    drawn = {line.strip("|` -").split()[0] for line in (errors.__doc__ or "").splitlines() if line}
    missing = [item.__name__ for item in CLASSES if item.__name__ not in drawn]
    assert not missing


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_no_error_of_ours_passes_for_mathematics(kind: type[DinopipeError]) -> None:
    assert not issubclass(kind, ValueError | OSError)


def test_what_the_user_can_fix_is_never_transient() -> None:
    assert not [
        kind
        for kind in CLASSES
        if issubclass(kind, errors.UserError) and issubclass(kind, errors.TransientError)
    ]


def test_exit_codes_follow_from_the_class() -> None:
    assert exit_code_of(errors.SettingsError("x")) == ExitCode.USER_ERROR == 2
    assert exit_code_of(errors.TrackingUnavailable("x")) == ExitCode.FAILED == 1
    assert exit_code_of(errors.Stopped("x")) == ExitCode.STOPPED == 75
    assert exit_code_of(KeyboardInterrupt()) == ExitCode.INTERRUPTED == 130
    assert exit_code_of(errors.Terminated()) == ExitCode.TERMINATED == 143
    assert exit_code_of(ZeroDivisionError()) == ExitCode.FAILED


def test_only_faults_of_the_project_show_a_traceback() -> None:
    assert shows_traceback(KeyError("x"))
    assert not shows_traceback(errors.StageFailed("x"))
    assert not shows_traceback(KeyboardInterrupt())
