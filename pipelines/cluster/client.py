"""The way to a Kubeflow Pipelines server: address, credentials, time limits, repeats, errors."""

from __future__ import annotations

import io
import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import kfp
import urllib3
from kfp.client import (
    KF_PIPELINES_SA_TOKEN_ENV,
    KF_PIPELINES_SA_TOKEN_PATH,
    ServiceAccountTokenVolumeCredentials,
)
from kfp_server_api import ApiException
from kfp_server_api.rest import RESTClientObject

HOST_ENV = "KF_PIPELINES_ENDPOINT"
TOKEN_ENV = "KF_PIPELINES_TOKEN"
COOKIE_ENV = "KF_PIPELINES_COOKIE"
CREDENTIAL_HEADERS = ("authorization", "cookie")
LONGEST_PAUSE_SECONDS = 30.0


class ClusterError(ValueError):
    """The server did not do what it was asked; the message says what to check.

    Attributes:
        status: HTTP status; 0 if there was no answer.
    """

    def __init__(self, message: str, *, status: int) -> None:
        super().__init__(message)
        self.status = status

    @property
    def may_pass(self) -> bool:
        """Whether the same request may succeed later: no answer, too many, or a server's fault."""
        return self.status in (0, 429) or self.status >= 500


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """How long a request may take and how often it is repeated."""

    timeout_seconds: float = 30.0
    """Until a connection stands, and again until an answer arrives."""
    pauses_seconds: tuple[float, ...] = (1.0, 2.0, 4.0, 8.0)
    """Before each repetition; the server's Retry-After goes first."""


PATIENCE = Patience()


@dataclass(frozen=True, slots=True, kw_only=True)
class Credentials:
    """What a server knows its caller by: at most one of them."""

    token: str = field(default="", repr=False)
    """Bearer token."""
    token_file: Path | None = None
    """File with a bearer token, read anew for every request, because tokens are rotated."""
    cookie: str = field(default="", repr=False)
    """Session cookie, such as `authservice_session=...`."""


def find_credentials(
    *, token_file: Path | None, cookie_file: Path | None, environment: Mapping[str, str]
) -> Credentials:
    """Credentials from a file or the environment; a pod's projected token if there is nothing else.

    Args:
        token_file: As named by the user.
        cookie_file: As named by the user.
        environment: Variables KF_PIPELINES_TOKEN, KF_PIPELINES_COOKIE and, for the place of the
            projected service account token, KF_PIPELINES_SA_TOKEN_PATH.

    Raises:
        ValueError: A file is missing or empty, or two kinds of credentials are given.
    """
    found = {
        "--token-file": Credentials(token_file=token_file) if token_file else None,
        "--cookie-file": Credentials(cookie=_secret_in(cookie_file)) if cookie_file else None,
    }
    if token_file is not None:
        _secret_in(token_file)
    if not any(found.values()):
        found = {
            TOKEN_ENV: Credentials(token=environment.get(TOKEN_ENV, "").strip()),
            COOKIE_ENV: Credentials(cookie=environment.get(COOKIE_ENV, "").strip()),
        }
    given = {name: value for name, value in found.items() if value not in (None, Credentials())}
    if len(given) > 1:
        raise ValueError(f"credentials are given twice, by {' and '.join(given)}; keep one")
    for value in given.values():
        if value is not None:
            return value
    projected = Path(environment.get(KF_PIPELINES_SA_TOKEN_ENV) or KF_PIPELINES_SA_TOKEN_PATH)
    return Credentials(token_file=projected) if projected.exists() else Credentials()


def _secret_in(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8").strip()
    except OSError as error:
        raise ValueError(
            f"credentials file {path} cannot be read ({error.strerror}); name another"
        ) from error
    if not text:
        raise ValueError(f"credentials file {path} is empty; put the token or cookie into it")
    return text


def connect(
    host: str,
    *,
    namespace: str = "",
    credentials: Credentials | None = None,
    ca_file: Path | None = None,
    patience: Patience = PATIENCE,
) -> kfp.Client:
    """A client of a server; nothing is sent yet.

    Args:
        host: Address of the API or of the user interface in front of it.
        namespace: Of a multi-user installation; empty for a single-user one.
        credentials: None sends none.
        ca_file: Certificates to trust; None are those of the certifi package.
        patience: Time limits and repetitions of every request.

    Raises:
        ValueError: The address is missing or holds a password, or the file is missing.
    """
    if not host:
        raise ValueError(
            f"no server to talk to; give --host https://... or set {HOST_ENV} (from this machine "
            "often http://localhost:8888 after kubectl port-forward -n kubeflow "
            "svc/ml-pipeline 8888)"
        )
    address = urlsplit(host if "://" in host else f"https://{host}")
    if address.username is not None or address.password is not None:
        raise ValueError(
            "--host holds a password; take it out and use --token-file or --cookie-file"
        )
    if address.scheme not in ("http", "https") or not address.hostname:
        raise ValueError(f"--host {host!r} is no address; write it like https://kubeflow.example")
    if ca_file is not None and not ca_file.is_file():
        raise ValueError(f"--ca-file {ca_file} is missing; name a file with PEM certificates")
    credentials = credentials or Credentials()
    volume = credentials.token_file
    client = kfp.Client(
        host=address.geturl(),
        # Where it is empty, the constructor asks the server for it, without a time limit.
        namespace=namespace or "none",
        existing_token=credentials.token or None,
        credentials=ServiceAccountTokenVolumeCredentials(str(volume)) if volume else None,
        cookies=credentials.cookie or None,
        ssl_ca_cert=str(ca_file) if ca_file else None,
    )
    client._context_setting["namespace"] = namespace
    return be_patient(client, patience)


def be_patient(client: kfp.Client, patience: Patience = PATIENCE) -> kfp.Client:
    """Give a client time limits, repetitions and errors that say what to do; once is enough."""
    api = client._run_api.api_client
    if not isinstance(api.rest_client, _PatientRequests):
        # Redirects lead to login pages, whose HTML the client would take for an answer.
        api.configuration.retries = urllib3.Retry(total=False)
        api.rest_client = _PatientRequests(api.configuration, patience)
    return client


def address_of(client: kfp.Client, page: str) -> str:
    """Where a person looks at something, such as `runs/details/ID`."""
    return f"{client._get_url_prefix().rstrip('/')}/#/{page}"


def fetch_text(client: kfp.Client, path: str, query: Mapping[str, str]) -> str:
    """Get plain text from a path that the client library does not know, with its credentials.

    It is asked for once: a server that has no log says so with an error of its own.

    Raises:
        ClusterError: There is none.
    """
    api = client._run_api.api_client
    headers = dict(api.default_headers)
    if api.cookie:
        headers["Cookie"] = api.cookie
    api.update_params_for_auth(headers, [], ["Bearer"])
    answer = api.rest_client.request(
        "GET",
        api.configuration.host + path,
        headers=headers,
        query_params=list(query.items()),
        is_repeated=False,
    )
    return bytes(answer.data).decode("utf-8", errors="replace")


@contextmanager
def without_chatter() -> Iterator[None]:
    """Keep the client library from printing links of its own."""
    with redirect_stdout(io.StringIO()):
        yield


class _PatientRequests(RESTClientObject):  # type: ignore[misc]
    """Requests of the generated client with a time limit, repeated where that does no harm."""

    def __init__(self, configuration: Any, patience: Patience) -> None:
        super().__init__(configuration)
        self.patience = patience

    def request(self, method: str, url: str, is_repeated: bool = True, **given: Any) -> Any:
        """One request and its repetitions.

        Raises:
            ClusterError: It failed.
        """
        limit = self.patience.timeout_seconds
        headers = given.pop("headers", None) or {}
        if given.get("_request_timeout") is None:
            given["_request_timeout"] = (limit, limit)
        waiting = list(self.patience.pauses_seconds) if is_repeated else []
        while True:
            try:
                # The library changes the headers it is given, so each attempt has its own.
                answer = super().request(method, url, headers=dict(headers), **given)
            except ApiException as error:
                failure = _Failure.of_answer(error, method=method, url=url, headers=headers)
            except urllib3.exceptions.HTTPError as error:
                failure = _Failure.of_silence(error, method=method, url=url)
            else:
                if "html" in (answer.getheader("content-type") or ""):
                    raise _Failure.of_web_page(url).error
                return answer
            if not waiting or not failure.is_repeatable:
                raise failure.error from None
            time.sleep(failure.pause_seconds or waiting[0])
            del waiting[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Failure:
    """Why a request failed and whether it may be sent again."""

    error: ClusterError
    is_repeatable: bool
    pause_seconds: float = 0.0

    @classmethod
    def of_answer(
        cls, error: ApiException, *, method: str, url: str, headers: Mapping[str, str]
    ) -> _Failure:
        status = int(error.status or 0)
        said = _said(error, headers)
        code = f"HTTP {status}: {said}" if said else f"HTTP {status}"
        message = f"{_server(url)} {_meaning(status, code)}"
        if status >= 500 and not _is_harmless_twice(method, url):
            message += "; it may have been done all the same: look before doing it again"
        repeatable = status == 429 or (status >= 500 and _is_harmless_twice(method, url))
        try:
            asked = float((error.headers or {}).get("Retry-After", 0))
        except ValueError:  # a date
            asked = 0.0
        return cls(
            error=ClusterError(message, status=status),
            is_repeatable=repeatable,
            pause_seconds=min(max(asked, 0.0), LONGEST_PAUSE_SECONDS),
        )

    @classmethod
    def of_silence(cls, error: Exception, *, method: str, url: str) -> _Failure:
        was_sent = not isinstance(
            error, (urllib3.exceptions.NewConnectionError, urllib3.exceptions.ConnectTimeoutError)
        )
        message = (
            f"{_server(url)} does not answer ({type(error).__name__}); check --host, the network "
            "and, if there is one, the port-forward"
        )
        harmless = _is_harmless_twice(method, url)
        if was_sent and not harmless:
            message += "; it may have been done all the same: look before doing it again"
        return cls(error=ClusterError(message, status=0), is_repeatable=harmless or not was_sent)

    @classmethod
    def of_web_page(cls, url: str) -> _Failure:
        message = (
            f"{_server(url)} answers with a web page; --host must be the address of Kubeflow "
            "Pipelines itself (on Kubeflow platforms it ends in /pipeline)"
        )
        return cls(error=ClusterError(message, status=404), is_repeatable=False)


def _is_harmless_twice(method: str, url: str) -> bool:
    """Whether doing it twice is as good as once: all but making something new."""
    return method.upper() != "POST" or ":" in url.rpartition("/")[2]


def _server(url: str) -> str:
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc}"


def _meaning(status: int, code: str) -> str:
    if status == 401 or 300 <= status < 400:
        return (
            f"does not accept the credentials ({code}); give a valid token (--token-file or "
            f"{TOKEN_ENV}) or cookie (--cookie-file or {COOKIE_ENV})"
        )
    if status == 403:
        return f"does not allow this ({code}); check --namespace and the account's roles in it"
    if status == 404:
        return (
            f"does not know it ({code}); check the name or id, --namespace, and that --host is a "
            "Kubeflow Pipelines 2 server"
        )
    if status == 409:
        return f"has it already ({code})"
    if status == 429:
        return f"is asked too often ({code}); try again later"
    if status == 0:
        return f"has a certificate that is not trusted ({code}); name its authority with --ca-file"
    return f"fails ({code})" if status >= 500 else f"refuses the request ({code})"


def _said(error: ApiException, headers: Mapping[str, str]) -> str:
    """The server's own words, one line, without the credentials that it may echo."""
    body = error.body.decode("utf-8", "replace") if isinstance(error.body, bytes) else ""
    try:
        content = json.loads(body)
        text = str(content.get("message") or content.get("error") or "")
    except (ValueError, AttributeError):
        text = "" if "<html" in body.lower() else body
    if error.status in (0, None):
        text = str(error.reason)
    for name, value in headers.items():
        if name.lower() in CREDENTIAL_HEADERS:
            for secret in (value, *value.replace("=", " ").replace(";", " ").split()):
                text = text.replace(secret, "***") if len(secret) > 6 else text
    return " ".join(text.split())[:300]


def host_from(given: str) -> str:
    """The address a user gave, else the one in the environment."""
    return given or os.environ.get(HOST_ENV, "")
