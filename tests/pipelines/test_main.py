from __future__ import annotations

import argparse
import resource
import signal
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from dinov2_core.errors import StageFailed
from pipelines import __main__
from pipelines.__main__ import command_parser, main
from tests.pipelines.specs import small_values, write_spec


def subcommands() -> dict[str, argparse.ArgumentParser]:
    (action,) = (
        action
        for action in command_parser()._actions
        if isinstance(action, argparse._SubParsersAction)
    )
    return dict(action.choices)


def test_every_command_is_there() -> None:
    assert set(subcommands()) == {
        "init", "validate", "schema", "run", "plan", "compile", "submit", "status", "wait", "logs",
        "cancel", "schedule", "schedules", "embed", "export",
    }  # fmt: skip


def test_the_help_of_every_command_shows_its_defaults() -> None:
    missing = []
    for name, parser in subcommands().items():
        text = " ".join(parser.format_help().split())
        for action in parser._actions:
            is_shown = action.default in (None, "", argparse.SUPPRESS) or action.default is False
            if not is_shown and str(action.default) not in text.partition("arguments:")[2]:
                missing.append(f"{name} {action.dest}")
    assert not missing
    assert "(default: subprocess)" in subcommands()["run"].format_help()


def test_the_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"dinopipe {version('dinopipe')}\n"


LIGHT = """
import importlib.abc, sys
HEAVY = {"kfp", "kubernetes", "kfp_server_api", "torch", "mlflow", "boto3", "pyarrow", "docker"}

class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in HEAVY:
            raise AssertionError(f"{name} is loaded")

sys.meta_path.insert(0, Refuse())
from pipelines.__main__ import main
codes = []
for command in (["--help"], ["--version"], ["run", "--help"], ["schema"], ["init", sys.argv[1]],
                ["validate", sys.argv[2]]):
    try:
        codes.append(main(command))
    except SystemExit as ended:
        codes.append(ended.code)
print(codes)
"""


def test_commands_that_only_read_a_spec_load_nothing_heavy(pile: Path, tmp_path: Path) -> None:
    spec = write_spec(small_values(pile), tmp_path / "spec.yaml")
    done = subprocess.run(
        [sys.executable, "-c", LIGHT, str(tmp_path / "new.yaml"), str(spec)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[0, 0, 0, 0, 0, 0]", done.stderr


def test_validate_answers_within_a_second(pile: Path, tmp_path: Path) -> None:
    """Of processor time, which another process does not stretch as it does the clock's."""
    spec = write_spec(small_values(pile), tmp_path / "spec.yaml")

    def processor_seconds() -> float:
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime

    taken = []
    for _ in range(3):
        before = processor_seconds()
        command = [sys.executable, "-m", "pipelines", "validate", str(spec)]
        subprocess.run(command, check=True, capture_output=True)
        taken.append(processor_seconds() - before)
        if taken[-1] < 1:
            break
    assert min(taken) < 1


@pytest.fixture
def ending(monkeypatch: pytest.MonkeyPatch) -> list[BaseException]:
    """Errors that the next command ends with."""
    errors: list[BaseException] = []

    def parser() -> argparse.ArgumentParser:
        made = argparse.ArgumentParser()
        made.add_argument("--workdir", default="")
        made.set_defaults(command=command)
        return made

    def command(_: argparse.Namespace) -> int:
        raise errors.pop()

    monkeypatch.setattr(__main__, "command_parser", parser)
    return errors


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (StageFailed("the ranks failed"), 1, "the ranks failed\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (BrokenPipeError(), 0, ""),
    ],
)
def test_the_exit_code_follows_from_the_error(
    error: BaseException,
    code: int,
    message: str,
    ending: list[BaseException],
    capsys: pytest.CaptureFixture[str],
) -> None:
    ending.append(error)
    assert main([]) == code
    assert capsys.readouterr().err == message


def test_a_full_disk_names_the_work_directory(
    ending: list[BaseException], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ending.append(OSError(28, "No space left on device"))
    assert main(["--workdir", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith(f"{tmp_path}: No space left on device (")


def test_faults_of_the_program_keep_their_traceback(
    ending: list[BaseException], capsys: pytest.CaptureFixture[str]
) -> None:
    ending.append(KeyError("x"))
    assert main([]) == 1
    shown = capsys.readouterr().err
    assert shown.startswith("Traceback")
    assert shown.endswith("KeyError: 'x'\n")


def test_sigterm_ends_a_command_as_ctrl_c_does(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def parser() -> argparse.ArgumentParser:
        made = argparse.ArgumentParser()
        made.set_defaults(command=lambda _: signal.raise_signal(signal.SIGTERM))
        return made

    monkeypatch.setattr(__main__, "command_parser", parser)
    assert main([]) == 143
    assert capsys.readouterr().err == "interrupted\n"


def test_output_may_be_cut_off() -> None:
    """As by `dinopipe schema | head -1`."""
    command = [sys.executable, "-m", "pipelines", "schema"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 0
