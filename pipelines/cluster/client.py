"""A client of Kubeflow Pipelines with credentials, time-outs, retries and helpful errors."""

from __future__ import annotations

import copy
import io
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self
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
from urllib3.exceptions import ConnectTimeoutError, HTTPError, NewConnectionError, SSLError

from dinov2_core.errors import PipelinesRefused, PipelinesUnavailable, SettingsError

HOST_ENV = "KF_PIPELINES_ENDPOINT"
TOKEN_ENV = "KF_PIPELINES_TOKEN"
COOKIE_ENV = "KF_PIPELINES_COOKIE"
CREDENTIAL_HEADERS = ("authorization", "cookie")
TOO_MANY_REQUESTS = 429
SERVER_ERRORS = range(500, 600)
LONGEST_PAUSE_SECONDS = 30
MAYBE_DONE = "; the request may have been carried out all the same: check before repeating it"


class NoAnswer(PipelinesUnavailable):
    """No connection, or no answer within the time-out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryPolicy:
    """Time-out and retries of a request."""

    timeout_seconds: float = 30.0
    """To connect, and again to answer."""
    max_retries: int = 4
    """A server's Retry-After is obeyed; a request that creates something is only repeated if the
    server has not received or has refused it."""
    backoff_seconds: float = 1.0
    """Doubles with each retry after the first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Credentials:
    """At most one of three ways to authenticate."""

    token: str = field(default="", repr=False)
    """Bearer token."""
    token_file: Path | None = None
    """File with a bearer token, read for every request, because tokens are rotated."""
    cookie: str = field(default="", repr=False)
    """Session cookie, such as `authservice_session=...`."""


def find_credentials(
    *, token_file: Path | None, cookie_file: Path | None, environment: Mapping[str, str]
) -> Credentials:
    """Credentials from a file, else from the environment, else a pod's projected token.

    Args:
        token_file: As named by the user.
        cookie_file: As named by the user.
        environment: Variables KF_PIPELINES_TOKEN, KF_PIPELINES_COOKIE and, for the path of the
            projected service account token, KF_PIPELINES_SA_TOKEN_PATH.

    Raises:
        SettingsError: A file is missing or empty, or there are two kinds of credentials.
    """
    token, cookie = (environment.get(name, "").strip() for name in (TOKEN_ENV, COOKIE_ENV))
    found: dict[str, Credentials] = {}
    if token_file is not None:
        _read_secret(token_file)
        found["--token-file"] = Credentials(token_file=token_file)
    if cookie_file is not None:
        found["--cookie-file"] = Credentials(cookie=_read_secret(cookie_file))
    if not found and token:
        found[TOKEN_ENV] = Credentials(token=token)
    if cookie and found.keys() <= {TOKEN_ENV}:
        found[COOKIE_ENV] = Credentials(cookie=cookie)
    if len(found) > 1:
        raise SettingsError(f"credentials are given twice, by {' and '.join(found)}; keep one")
    for credentials in found.values():
        return credentials
    projected = Path(environment.get(KF_PIPELINES_SA_TOKEN_ENV) or KF_PIPELINES_SA_TOKEN_PATH)
    return Credentials(token_file=projected) if projected.exists() else Credentials()


def _read_secret(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8").strip()
    except OSError as error:
        raise SettingsError(
            f"credentials file {path} cannot be read ({error.strerror}); name another"
        ) from error
    if not text:
        raise SettingsError(f"credentials file {path} is empty; put the token or cookie into it")
    return text


def resolve_host(host: str) -> str:
    """The address a user gave, else the one in the environment."""
    return host or os.environ.get(HOST_ENV, "")


def connect(
    host: str,
    *,
    namespace: str = "",
    credentials: Credentials | None = None,
    ca_file: Path | None = None,
    retry_policy: RetryPolicy | None = None,
) -> kfp.Client:
    """A client of a server; nothing is sent yet.

    Args:
        host: Address of the API or of the user interface in front of it.
        namespace: Of a multi-user installation; empty for a single-user one.
        credentials: None sends none.
        ca_file: Certificates to trust; None are those of the certifi package.
        retry_policy: None is the default.

    Raises:
        SettingsError: The address is missing or holds a password, or the file is missing.
    """
    if not host:
        raise SettingsError(
            f"no server to talk to; give --host https://... or set {HOST_ENV} (from this machine "
            "often http://localhost:8888 after kubectl port-forward -n kubeflow "
            "svc/ml-pipeline 8888)"
        )
    address = urlsplit(host if "://" in host else f"https://{host}")
    if address.username is not None or address.password is not None:
        raise SettingsError(
            "--host holds a password; take it out and use --token-file or --cookie-file"
        )
    if address.scheme not in ("http", "https") or not address.hostname:
        raise SettingsError(
            f"--host {host!r} is no address; write it like https://kubeflow.example"
        )
    if ca_file is not None and not ca_file.is_file():
        raise SettingsError(f"--ca-file {ca_file} is missing; name a file with PEM certificates")
    credentials = credentials or Credentials()
    volume = credentials.token_file
    client = kfp.Client(
        host=address.geturl(),
        # If it is empty, the constructor asks the server for it, without a time-out.
        namespace=namespace or "none",
        existing_token=credentials.token or None,
        credentials=ServiceAccountTokenVolumeCredentials(str(volume)) if volume else None,
        cookies=credentials.cookie or None,
        ssl_ca_cert=str(ca_file) if ca_file else None,
    )
    client._context_setting["namespace"] = namespace
    return with_retries(client, retry_policy)


def with_retries(client: kfp.Client, policy: RetryPolicy | None = None) -> kfp.Client:
    """Give a client time-outs, retries and this project's errors, unless it has them already."""
    api = client._run_api.api_client
    if not isinstance(api.rest_client, _Requests):
        api.rest_client = _Requests(api.configuration, policy or RetryPolicy())
    return client


def address_of(client: kfp.Client, page: str) -> str:
    """Address of a page of the user interface, such as `runs/details/ID`."""
    return f"{client._get_url_prefix().rstrip('/')}/#/{page}"


def fetch_text(client: kfp.Client, path: str, query: Mapping[str, str]) -> str:
    """Get plain text from a path that the client library does not know, with its credentials.

    There are no retries: a server that has no log answers with an error of its own.

    Raises:
        PipelinesRefused: The server refuses it or has none.
        PipelinesUnavailable: The server fails; NoAnswer if it does not answer.
    """
    api = client._run_api.api_client
    headers = dict(api.default_headers)
    if api.cookie:
        headers["Cookie"] = api.cookie
    api.update_params_for_auth(headers, [], ["Bearer"])
    once = _Requests(api.configuration, replace(api.rest_client.policy, max_retries=0))
    url = api.configuration.host + path
    answer = once.request("GET", url, headers=headers, query_params=list(query.items()))
    return bytes(answer.data).decode("utf-8", errors="replace")


@contextmanager
def client_output_hidden() -> Iterator[None]:
    """Keep the client library from printing links of its own."""
    with redirect_stdout(io.StringIO()):
        yield


class _Retry(urllib3.Retry):
    """Also repeats a POST that the server turned away, and nothing where a certificate is wrong."""

    def is_retry(self, method: str, status_code: int, has_retry_after: bool = False) -> bool:
        return status_code == TOO_MANY_REQUESTS or super().is_retry(
            method, status_code, has_retry_after
        )

    def increment(self, *args: Any, **options: Any) -> Self:
        if isinstance(options.get("error"), SSLError):
            raise options["error"]
        return super().increment(*args, **options)


class _Requests(RESTClientObject):  # type: ignore[misc]
    """Requests of the generated client with a time-out, retries and this project's errors."""

    def __init__(self, configuration: Any, policy: RetryPolicy) -> None:
        self.policy = policy
        configuration = copy.copy(configuration)
        configuration.retries = _Retry(
            total=policy.max_retries,
            redirect=0,  # to login pages, whose HTML the client would take for an answer
            raise_on_redirect=False,
            raise_on_status=False,
            status_forcelist=SERVER_ERRORS,
            backoff_factor=policy.backoff_seconds,
            backoff_max=LONGEST_PAUSE_SECONDS,
            retry_after_max=LONGEST_PAUSE_SECONDS,
        )
        super().__init__(configuration)

    def request(self, method: str, url: str, **options: Any) -> Any:
        """One request with its retries.

        Raises:
            PipelinesRefused: The server refuses it.
            PipelinesUnavailable: The server fails; NoAnswer if it does not answer.
        """
        if options.get("_request_timeout") is None:
            options["_request_timeout"] = (self.policy.timeout_seconds,) * 2
        sent = dict(options.get("headers") or {})  # the library changes the headers it is given
        try:
            answer = super().request(method, url, **options)
        except ApiException as error:
            raise _error_of_answer(error, method=method, url=url, headers=sent) from None
        except HTTPError as error:
            raise _error_without_answer(error, method=method, url=url) from None
        if "html" in (answer.getheader("content-type") or ""):
            raise PipelinesRefused(
                f"{_server(url)} answers with a web page; --host must be the address of Kubeflow "
                "Pipelines itself (on Kubeflow platforms it ends in /pipeline)",
                status=404,
            )
        return answer


def _error_of_answer(
    error: ApiException, *, method: str, url: str, headers: Mapping[str, str]
) -> PipelinesRefused | PipelinesUnavailable:
    status, text = int(error.status or 0), _message_of(error, headers)
    code = f"HTTP {status}: {text}" if text else f"HTTP {status}"
    message = f"{_server(url)} {_explanation(status, code)}"
    if status in SERVER_ERRORS:
        return PipelinesUnavailable(message + (MAYBE_DONE if method.upper() == "POST" else ""))
    if status == TOO_MANY_REQUESTS:
        return PipelinesUnavailable(message)
    return PipelinesRefused(message, status=status)


def _error_without_answer(error: HTTPError, *, method: str, url: str) -> NoAnswer:
    reason = getattr(error, "reason", None) or error
    was_sent = not isinstance(reason, NewConnectionError | ConnectTimeoutError)
    message = (
        f"{_server(url)} does not answer ({type(reason).__name__}); check --host, the network and, "
        "if there is one, the port-forward"
    )
    return NoAnswer(message + (MAYBE_DONE if was_sent and method.upper() == "POST" else ""))


def _server(url: str) -> str:
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc}"


def _explanation(status: int, code: str) -> str:
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
    if status == TOO_MANY_REQUESTS:
        return f"is asked too often ({code}); try again later"
    if status == 0:
        return f"has a certificate that is not trusted ({code}); name its authority with --ca-file"
    return f"fails ({code})" if status in SERVER_ERRORS else f"refuses the request ({code})"


def _message_of(error: ApiException, headers: Mapping[str, str]) -> str:
    """The server's message, one line, without the credentials that it may echo."""
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
