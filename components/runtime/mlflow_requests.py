"""Requests to MLflow: its errors become ours, and transient ones are retried, in this one place."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TypeVar
from urllib.parse import urlsplit

import mlflow
import requests
from mlflow.exceptions import InvalidUrlException, MlflowException

from components.runtime import s3
from components.runtime.retry import retried
from components.runtime.uris import without_password
from dinov2_core.errors import DinopipeError, TrackingRefused, TrackingUnavailable

CLIENT_DEFAULTS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",  # its own repeat what is not idempotent
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}
"""Variables that MLflow's client reads, unless the user sets them otherwise."""
ADVICE = (
    "check tracking.uri, start the server (mlflow server --port 5000), or leave tracking.uri "
    "empty for a store in the work directory"
)
BUSY = (408, 429)
MESSAGE_CHARACTERS = 600
"""Of an answer that a message shows: proxies answer with whole pages."""
_T = TypeVar("_T")


def check_reachable(uri: str, *, timeout_seconds: float = 3.0) -> None:
    """Ask a tracking server once whether it is well; a store needs no asking.

    Raises:
        TrackingUnavailable: No answer within the time, or one that the server is not well.
        TrackingRefused: The address answers something else.
    """
    if urlsplit(uri).scheme not in ("http", "https"):
        return
    server = f"tracking server {without_password(uri)}"
    try:
        answer = requests.get(uri.rstrip("/") + "/health", timeout=timeout_seconds)
    except (requests.exceptions.InvalidURL, requests.exceptions.MissingSchema) as error:
        raise TrackingRefused(f"{server} is no address; {ADVICE}") from error
    except requests.RequestException as error:
        reason = type(error).__name__
        raise TrackingUnavailable(f"{server} does not answer ({reason}); {ADVICE}") from error
    message = f"{server} answers HTTP {answer.status_code} to /health; {ADVICE}"
    if answer.status_code >= 500 or answer.status_code in BUSY:
        raise TrackingUnavailable(message)
    if answer.status_code >= 400:
        raise TrackingRefused(message, status=answer.status_code)


def connected_client(uri: str) -> mlflow.MlflowClient:
    """MLflow's client for a server or store, as soon as it answers.

    Raises:
        TrackingUnavailable, TrackingRefused: As for `check_reachable`.
    """
    for name, value in CLIENT_DEFAULTS.items():
        os.environ.setdefault(name, value)
    retried(lambda: check_reachable(uri))
    return ask_mlflow(lambda: mlflow.MlflowClient(tracking_uri=uri, registry_uri=uri), uri=uri)


def ask_mlflow(call: Callable[[], _T], *, uri: str) -> _T:
    """What a call of MLflow gives, repeated under the retry policy; it must be idempotent.

    Args:
        call: One request, or several that may be made again together.
        uri: Of the server or store, for messages.

    Raises:
        TrackingUnavailable: The server does not answer, or not as it should.
        TrackingRefused: It refuses the request; `status` is the HTTP status.
        StoreRefused, StoreUnavailable: The same of the store that holds its artifacts.
    """

    def once() -> _T:
        try:
            return call()
        except (MlflowException, requests.RequestException, *s3.FAILURES) as error:
            raise _explained(error, uri) from error

    return retried(once)


def is_absent(error: TrackingRefused) -> bool:
    """Whether MLflow refused because there is no such run, model, version or alias."""
    cause = error.__cause__
    return isinstance(cause, MlflowException) and cause.error_code == "RESOURCE_DOES_NOT_EXIST"


def _explained(error: Exception, uri: str) -> DinopipeError:
    server = without_password(uri)
    reason = without_password(str(error))[:MESSAGE_CHARACTERS]
    if isinstance(error, MlflowException):
        is_invalid = isinstance(error, InvalidUrlException)
        status = 400 if is_invalid else error.get_http_status_code()  # type: ignore[no-untyped-call]
    elif isinstance(error, requests.RequestException):
        status = 503 if error.response is None else error.response.status_code
    else:
        return s3.explained(error, f"the artifacts of {server}")
    if status == 501 or (status < 500 and status not in BUSY):
        return TrackingRefused(f"MLflow at {server} refuses: {reason}", status=status)
    return TrackingUnavailable(f"MLflow at {server} does not answer as it should: {reason}")
