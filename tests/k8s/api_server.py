"""A Kubernetes API server for tests: on loopback, in memory, strict where clients go wrong."""

from __future__ import annotations

import json
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from copy import deepcopy
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from kubernetes import client

from k8s.cluster import Cluster
from tests.k8s.schemas import schema_problems

TOKEN = "the-service-account's-token"
JOBS = re.compile(
    r"/apis/trainer\.kubeflow\.org/v1alpha1/namespaces/([^/]+)/(trainjobs)(?:/([^/]+))?"
)
CORE = re.compile(r"/api/v1/namespaces/([^/]+)/(pods|events)(?:/([^/]+)/log)?")

Object = dict[str, Any]


class Refused(Exception):
    """An answer that is not a success."""

    def __init__(self, code: int, reason: str, message: str, **details: str) -> None:
        super().__init__(message)
        self.code = code
        self.status = {
            "kind": "Status",
            "apiVersion": "v1",
            "status": "Failure",
            "code": code,
            "reason": reason,
            "message": message,
            "details": details,
        }


@dataclass
class ApiServer:
    """What the server holds, and what a test makes it do."""

    namespace: str = "team"
    address: str = ""
    jobs: dict[str, Object] = field(default_factory=dict)
    pods: list[Object] = field(default_factory=list)
    logs: dict[str, list[str]] = field(default_factory=dict)
    events: list[Object] = field(default_factory=list)
    requests: list[tuple[str, str]] = field(default_factory=list)
    faults: deque[tuple[int, dict[str, str]]] = field(default_factory=deque)
    """Codes (and headers) that the next requests are answered with; 0 hangs up."""
    is_trainer_installed: bool = True
    script: dict[str, deque[Callable[[Object], None]]] = field(default_factory=dict)
    """What the controllers do to a job before each look at it."""
    forbidden: set[str] = field(default_factory=set)
    """Methods that the service account may not use."""
    looks_until_gone: int = 2
    """Looks at a deleted job for which it is still there."""
    silent_seconds: float = 0.0
    """Before any answer."""
    lock: threading.RLock = field(default_factory=threading.RLock)

    def cluster(self, *, token: str = TOKEN, timeout_seconds: float = 5.0) -> Cluster:
        """The real client, talking to this server."""
        settings = client.Configuration(host=self.address, api_key={"authorization": token})
        settings.api_key_prefix = {"authorization": "Bearer"}
        settings.retries = False
        return Cluster(
            api=client.ApiClient(settings),
            namespace=self.namespace,
            first_pause_seconds=0.01,
            timeout_seconds=(timeout_seconds, timeout_seconds),
        )

    def write_kubeconfig(self, file: Path) -> Path:
        """A file that leads kubectl and others to this server."""
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "c",
            "contexts": [{"name": "c", "context": {"cluster": "k", "user": "u"}}],
            "clusters": [{"name": "k", "cluster": {"server": self.address}}],
            "users": [{"name": "u", "user": {"token": TOKEN}}],
        }
        file.write_text(json.dumps(config))
        return file

    def made(self, method: str) -> list[str]:
        """Paths of the requests of a method."""
        return [path for name, path in self.requests if name == method]

    def answer(self, method: str, path: str, query: dict[str, str], body: Object) -> object:
        """What a request gets."""
        with self.lock:
            self.requests.append((method, path))
            if method in self.forbidden:
                raise Refused(403, "Forbidden", f'cannot {method} resource in "{self.namespace}"')
            found = JOBS.fullmatch(path)
            if found is not None and self.is_trainer_installed:
                return self._job(method, query, body, *found.group(1, 2, 3))
            core = CORE.fullmatch(path)
            if core is not None:
                return self._of_core(query, *core.group(2, 3))
            raise Refused(404, "", "404 page not found")

    def _job(self, method: str, query: dict[str, str], body: Object, *path: str | None) -> Object:
        namespace, plural, name = path
        if namespace != self.namespace:
            raise Refused(
                404, "NotFound", f'namespaces "{namespace}" not found',
                name=str(namespace), kind="namespaces",
            )  # fmt: skip
        if method == "POST":
            return self._create(query, body)
        if name not in self.jobs:
            raise Refused(404, "NotFound", f'{plural} "{name}" not found', name=str(name))
        assert name is not None
        if method == "GET":
            return self._look(name)
        if method == "PATCH":
            self._check(query, merged(self.jobs[name], body))
            self.jobs[name] = merged(self.jobs[name], body)
            return self.jobs[name]
        assert (method, query.get("propagationPolicy")) == ("DELETE", "Foreground")
        self.jobs[name]["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
        self.script[name] = deque([lambda _: None] * self.looks_until_gone)
        return self.jobs[name]

    def _create(self, query: dict[str, str], body: Object) -> Object:
        name = body["metadata"]["name"]
        if body["kind"] != "TrainJob" or body["metadata"]["namespace"] != self.namespace:
            raise Refused(400, "BadRequest", "the object does not belong to the address")
        self._check(query, body)
        if name in self.jobs:
            raise Refused(409, "AlreadyExists", f'"{name}" already exists', name=name)
        self.jobs[name] = deepcopy(body)
        return self.jobs[name]

    def _check(self, query: dict[str, str], body: Object) -> None:
        known = {key: value for key, value in body.items() if key != "status"}
        problems = schema_problems(known)
        if query.get("fieldValidation") != "Strict":  # as the real one: dropped, not refused
            problems = [problem for problem in problems if "unknown field" not in problem]
        if problems:
            raise Refused(400, "BadRequest", f"strict decoding error: {'; '.join(problems)}")
        name, wrong = known["metadata"]["name"], []
        if not re.fullmatch(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?", name):
            wrong.append("metadata.name must match RFC 1035 DNS label format")
        variables = known["spec"].get("trainer", {}).get("env", ())
        names = [variable["name"] for variable in variables]
        wrong += [f"spec.trainer.env: {name} is reserved" for name in names if name[:4] == "PET_"]
        managers = [patch["manager"] for patch in known["spec"].get("runtimePatches", ())]
        wrong += ["manager must be a domain-prefixed path" for name in managers if "/" not in name]
        if wrong:
            raise Refused(403, "Forbidden", f"admission webhook denied the request: {wrong}")

    def _look(self, name: str) -> Object:
        job = self.jobs[name]
        steps = self.script.get(name, deque())
        if steps:
            steps.popleft()(job)
        elif "deletionTimestamp" in job["metadata"]:
            del self.jobs[name]
            raise Refused(404, "NotFound", f'"{name}" not found', name=name)
        return job

    def _of_core(self, query: dict[str, str], kind: str, pod: str | None) -> object:
        if pod is not None:
            if "pods/log" in self.forbidden:
                raise Refused(
                    403, "Forbidden", 'pods/log is forbidden: cannot get resource "pods/log"'
                )
            if pod not in self.logs:
                raise Refused(400, "BadRequest", f'container in pod "{pod}" is waiting to start')
            return "".join(f"{line}\n" for line in self.logs[pod][-int(query["tailLines"]) :])
        key, _, value = query.get("labelSelector", query.get("fieldSelector", "")).partition("=")
        if kind == "pods":
            found = [item for item in self.pods if item["metadata"]["labels"].get(key) == value]
        else:
            found = [item for item in self.events if item["involvedObject"]["name"] == value]
        return {"kind": "List", "apiVersion": "v1", "items": found}


def merged(old: Object, change: Object) -> Object:
    """A JSON merge patch, RFC 7386."""
    new = deepcopy(old)
    for key, value in change.items():
        if value is None:
            new.pop(key, None)
        elif isinstance(value, dict) and isinstance(new.get(key), dict):
            new[key] = merged(new[key], value)
        else:
            new[key] = value
    return new


@contextmanager
def api_server() -> Iterator[ApiServer]:
    """A server on a free port of loopback."""
    state = ApiServer()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True
        wbufsize = -1  # head and body in one packet

        def answer(self) -> None:
            address = urlsplit(self.path)
            query = {key: values[0] for key, values in parse_qs(address.query).items()}
            body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or "{}")
            time.sleep(state.silent_seconds)
            if self.headers.get("Authorization") != f"Bearer {TOKEN}":
                self.tell(401, {"kind": "Status", "message": "Unauthorized"})
                return
            if state.faults:
                state.requests.append(("FAULT", address.path))
                code, headers = state.faults.popleft()
                if code == 0:
                    self.close_connection = True
                    self.connection.close()
                    return
                self.tell(code, {"kind": "Status", "message": "not now"}, headers)
                return
            try:
                self.tell(200, state.answer(self.command, address.path, query, body))
            except Refused as refused:
                self.tell(refused.code, refused.status)

        def tell(self, code: int, content: object, headers: dict[str, str] | None = None) -> None:
            data = (content if isinstance(content, str) else json.dumps(content)).encode()
            self.send_response(code)
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(data)))
            with suppress(ConnectionError):  # nobody waits for a slow answer any more
                self.end_headers()
                self.wfile.write(data)
                self.wfile.flush()

        def log_message(self, *args: object) -> None:
            pass

        do_GET = do_POST = do_PATCH = do_DELETE = answer  # noqa: N815

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    state.address = f"http://127.0.0.1:{server.server_port}"
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
