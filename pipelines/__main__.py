"""The console command `dinopipe`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

from components.runtime.file_errors import explained
from components.runtime.interrupts import sigterm_like_interrupt
from components.runtime.logging import log_error, set_up_logging
from dinov2_core.errors import ExitCode, SettingsError


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; exit codes are those of `dinov2_core.errors`."""
    args = argparse.Namespace()
    try:
        with sigterm_like_interrupt():
            set_up_logging()
            args = command_parser().parse_args(argv)
            code = int(args.command(args))
            sys.stdout.flush()
            return code
    except BrokenPipeError:
        from pipelines.local.display import discard_output

        discard_output()
        return ExitCode.DONE
    except (Exception, KeyboardInterrupt) as error:
        return log_error(_explained(error, args))


def command_parser() -> argparse.ArgumentParser:
    """The parser of all commands; each folder adds its own."""
    from pipelines import spec_commands
    from pipelines.cluster import commands as cluster_commands
    from pipelines.local import commands as local_commands
    from pipelines.model import commands as model_commands
    from pipelines.plan import command as plan_command

    parser = _Parser(
        prog="dinopipe", description="Turns unlabelled images into a registered DINOv2 backbone."
    )
    parser.add_argument("--version", action="version", version=f"dinopipe {_version()}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for folder in (spec_commands, local_commands, plan_command, cluster_commands, model_commands):
        folder.add_commands(commands)
    return parser


class _Defaults(argparse.HelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        """The help of a flag, with its default where it has one."""
        nothing = any(action.default is value for value in (None, False, argparse.SUPPRESS))
        is_shown = not nothing and action.default != "" and "%(default)" not in (action.help or "")
        return f"{action.help or ''} (default: %(default)s)".strip() if is_shown else action.help


class _Parser(argparse.ArgumentParser):
    """Shows defaults; parsers of commands take over the class."""

    def __init__(self, **settings: object) -> None:
        super().__init__(**{"formatter_class": _Defaults, **settings})  # type: ignore[arg-type]


def _version() -> str:
    try:
        return version("dinopipe")
    except PackageNotFoundError:
        return "(not installed)"


def _explained(error: BaseException, args: argparse.Namespace) -> BaseException:
    """An error with the file that it is about, where its own message does not name it."""
    problems = getattr(error, "problems", ())
    if problems:
        plural = "s" if len(problems) > 1 else ""
        return SettingsError(f"{args.spec} has {len(problems)} problem{plural}:\n{error}")
    if isinstance(error, OSError) and error.errno is not None:
        directory = getattr(args, "workdir", None) or getattr(args, "output", None) or "."
        return explained(error, directory=directory)
    return error


if __name__ == "__main__":
    sys.exit(main())
