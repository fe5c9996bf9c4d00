"""An S3 server on loopback, and a bad line to it."""

from __future__ import annotations

import http.client
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

import boto3
import pytest
from moto.server import ThreadedMotoServer

BUCKET = "pile"
CODES = {
    400: "ExpiredToken",
    403: "AccessDenied",
    429: "TooManyRequests",
    500: "InternalError",
    501: "NotImplemented",
    503: "SlowDown",
}


@contextmanager
def s3_server(patch: pytest.MonkeyPatch, *, cache_directory: Path) -> Iterator[str]:
    """A server without objects, which the environment names together with a cache."""
    endpoint = _endpoint()
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        patch.delenv(name)
    patch.setenv("AWS_ENDPOINT_URL", endpoint)
    patch.setenv("AWS_ACCESS_KEY_ID", "test")
    patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    patch.setenv("DINOPIPE_CACHE", str(cache_directory))
    urlopen(Request(f"{endpoint}/moto-api/reset", method="POST")).close()
    boto3.client("s3").create_bucket(Bucket=BUCKET)
    yield endpoint


@cache
def _endpoint() -> str:
    """Address of this process's server, which is emptied for each test and never stopped."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    return f"http://{host}:{port}"


class BadLine:
    """Passes requests on to a server and does to some of them what a fault says.

    Faults are taken one after the other for the requests that `concerns` picks; afterwards
    everything arrives. They are `answer 503` or another code, `drop` (the connection, after half of the request
    has gone), `lose` (the answer, to a request that the server has obeyed), `truncate` (the
    answer's bytes, so that the client sees the line break), and `corrupt` (one byte of the answer,
    which the line does not show).
    """

    def __init__(
        self, endpoint: str, *, faults: list[str], concerns: Callable[[str, str], bool]
    ) -> None:
        self._to = urlsplit(endpoint)
        self.faults = faults
        self._concerns = concerns
        self._lock = threading.Lock()
        self.requests: list[tuple[str, str]] = []

    def next_fault(self, method: str, path: str) -> str:
        """What happens to a request."""
        with self._lock:
            self.requests.append((method, path))
            is_hit = bool(self.faults) and self._concerns(method, path)
            return self.faults.pop(0) if is_hit else ""

    @contextmanager
    def open(self, patch: pytest.MonkeyPatch) -> Iterator[BadLine]:
        """Let the environment name the line instead of the server."""
        with self.served() as address:
            patch.setenv("AWS_ENDPOINT_URL", address)
            yield self
            patch.setenv("AWS_ENDPOINT_URL", self._to.geturl())

    @contextmanager
    def served(self) -> Iterator[str]:
        """Pass requests on; gives the address of the line."""
        server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            server.server_close()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        line = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def pass_on(self) -> None:
                fault = line.next_fault(self.command, self.path)
                if fault == "drop":
                    self.rfile.read(int(self.headers.get("Content-Length", 0)) // 2)
                    self.close_connection = True
                    self.connection.close()
                    return
                body = self.read_body()
                if fault.startswith("answer "):
                    status = int(fault.split()[1])
                    self.answer(
                        status,
                        {},
                        f"<Error><Code>{CODES.get(status, 'Error')}</Code></Error>".encode(),
                    )
                    return
                link = http.client.HTTPConnection(line._to.netloc, timeout=30)
                headers = {k: v for k, v in self.headers.items() if k.lower() != "expect"}
                link.request(self.command, self.path, body=body, headers=headers)
                got = link.getresponse()
                content = got.read()
                if fault == "lose":
                    self.close_connection = True
                    self.connection.close()
                    return
                headers = dict(got.getheaders())
                if fault == "corrupt":
                    content = bytes([content[0] ^ 1]) + content[1:]
                self.answer(got.status, headers, content, is_cut=fault == "truncate")

            def read_body(self) -> bytes:
                if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
                    return self.rfile.read(int(self.headers.get("Content-Length", 0)))
                raise AssertionError("chunked")

            def answer(
                self, status: int, headers: dict[str, str], content: bytes, is_cut: bool = False
            ) -> None:
                self.send_response_only(status)
                length = headers.get("content-length") or headers.get("Content-Length")
                for name, value in headers.items():
                    if name.lower() not in ("content-length", "connection", "transfer-encoding"):
                        self.send_header(name, value)
                is_head = self.command == "HEAD"
                size = length if is_head and length else str(len(content))
                self.send_header("Content-Length", size)
                self.end_headers()
                if is_cut:
                    self.wfile.write(content[: len(content) // 2])
                    self.close_connection = True
                elif not is_head:
                    self.wfile.write(content)

            do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = pass_on  # noqa: N815

            def log_message(self, *arguments: Any) -> None:
                return

        return Handler
