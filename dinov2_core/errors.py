"""Every exception that this project raises on purpose, and what follows from its class.

::

    DinopipeError                   message only; exit 1
    |- UserError                    somebody must change something; exit 2 (64 in a training pod),
    |  |                            never retried
    |  |- SettingsError             a setting or a flag
    |  |  `- SpecError                every problem of a spec (pipelines.spec.problems)
    |  |- InputError                what a setting names: images, tables, weights, manifests
    |  |  |- UnreadableImage          one image; the others may be fine
    |  |  |- ObjectUnreadable         one object of a store; the others may be fine
    |  |  `- LabelsMismatch           labelled sets that do not belong together
    |  |- AccessRefused             a service answers and says no: credentials, permissions, names
    |  |  |- StoreRefused             object store
    |  |  |- TrackingRefused          MLflow
    |  |  |- ClusterRefused           Kubernetes API server
    |  |  `- PipelinesRefused         Kubeflow Pipelines
    |  `- TrainingDiverged          loss or features: the settings or the images must change
    |     |- NonFiniteLoss            going back and a lower learning rate did not help
    |     `- CollapsedFeatures        guards.collapse.action is `stop`
    |- TransientError               the same request may succeed later; retried with backoff,
    |  |                            then exit 1
    |  |- StoreUnavailable
    |  |- TrackingUnavailable
    |  |- ClusterUnavailable
    |  `- PipelinesUnavailable
    |- StageFailed                  a process or a job that a stage started has failed; exit 1
    |- CheckpointError              checkpoints cannot be written or read; exit 1
    |- LeaseLost                    another run works here now: stop, and write nothing; exit 1
    `- Stopped                      SIGTERM, with all that was done saved; exit 75

KeyboardInterrupt (Ctrl-C, exit 130) and Terminated (SIGTERM to the command line, exit 143) are
requests to stop. Any other exception is a fault of the project: it is shown with its traceback,
exit 1. ValueError is for mathematics (a shape, a range) and for validators of settings; no
transient fault is one.
"""

from __future__ import annotations

from enum import IntEnum
from typing import ClassVar


class ExitCode(IntEnum):
    """How a process of this project ends."""

    DONE = 0
    FAILED = 1
    """Anything that none of the others names; another attempt may succeed."""
    USER_ERROR = 2
    """Somebody must change something first."""
    POD_USER_ERROR = 64
    """The same from a training pod (EX_USAGE), where jobs tell it from a crash."""
    STOPPED = 75
    """Stopped by SIGTERM with all saved (EX_TEMPFAIL); start again to go on."""
    INTERRUPTED = 130
    """Ctrl-C."""
    TERMINATED = 143
    """SIGTERM to the command line."""


class DinopipeError(Exception):
    """What the project raises on purpose; the message is all that a user needs."""

    exit_code: ClassVar[ExitCode] = ExitCode.FAILED


class UserError(DinopipeError):
    """Somebody must change something; says what, which value, what would be right, and where."""

    exit_code = ExitCode.USER_ERROR


class SettingsError(UserError):
    """A setting or a flag is wrong."""


class InputError(UserError):
    """What a setting names is wrong: images, tables, weights, manifests."""


class UnreadableImage(InputError):
    """One image cannot be decoded; the others may be fine.

    Args:
        message: For the user.
        reason: In one word, as curation counts it.
    """

    def __init__(self, message: str, *, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


class ObjectUnreadable(InputError):
    """One object cannot be read, while its store answers; the others may be fine."""


class LabelsMismatch(InputError):
    """Labelled sets do not belong together."""


class AccessRefused(UserError):
    """A service answers and refuses: credentials, permissions or names.

    Args:
        message: For the user.
        status: HTTP status of the answer; 0 where there was none.
    """

    def __init__(self, message: str, *, status: int = 0) -> None:
        super().__init__(message)
        self.status = status


class StoreRefused(AccessRefused):
    """The object store refuses a request."""


class TrackingRefused(AccessRefused):
    """MLflow refuses a request."""


class ClusterRefused(AccessRefused):
    """The Kubernetes API server refuses a request."""


class PipelinesRefused(AccessRefused):
    """Kubeflow Pipelines refuses a request."""


class TrainingDiverged(UserError):
    """Training cannot go on with these settings and images."""


class NonFiniteLoss(TrainingDiverged):
    """Going back to a checkpoint did not help either.

    Args:
        message: For the user.
        diagnosis: Step, numbers, ranks and suspected images; a dataclass.
    """

    def __init__(self, message: str, *, diagnosis: object) -> None:
        super().__init__(message)
        self.diagnosis = diagnosis


class CollapsedFeatures(TrainingDiverged):
    """An indicator of collapse crossed its threshold, and settings say to stop."""


class TransientError(DinopipeError):
    """The same request may succeed later."""


class StoreUnavailable(TransientError):
    """The object store does not answer, or not as it should."""


class TrackingUnavailable(TransientError):
    """MLflow does not answer, or not as it should."""


class ClusterUnavailable(TransientError):
    """The Kubernetes API server does not answer, or not as it should."""


class PipelinesUnavailable(TransientError):
    """Kubeflow Pipelines does not answer, or not as it should."""


class StageFailed(DinopipeError):
    """A process or a job that a stage started has failed."""


class CheckpointError(DinopipeError):
    """Checkpoints cannot be written or read."""


class LeaseLost(DinopipeError):
    """Another run works in this directory now: this one must stop and write nothing more."""


class Stopped(DinopipeError):
    """Told to stop; what was done is saved, and the same command goes on from it."""

    exit_code = ExitCode.STOPPED


class Terminated(KeyboardInterrupt):
    """SIGTERM to the command line, which is handled as Ctrl-C is."""


def exit_code_of(error: BaseException) -> ExitCode:
    """The exit code of a process that ends with an error."""
    match error:
        case DinopipeError():
            return error.exit_code
        case Terminated():
            return ExitCode.TERMINATED
        case KeyboardInterrupt():
            return ExitCode.INTERRUPTED
        case _:
            return ExitCode.FAILED


def shows_traceback(error: BaseException) -> bool:
    """Whether an error is the project's own fault, so that its message alone does not help."""
    return not isinstance(error, DinopipeError | KeyboardInterrupt)


def message_of(error: BaseException) -> str:
    """An error in one line: its message; for a fault of the project its class as well."""
    if shows_traceback(error):
        return f"{type(error).__name__}: {error}"
    return str(error) or "interrupted"
