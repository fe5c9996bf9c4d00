"""A stand-in for Kubeflow Pipelines on loopback: the v2beta1 REST calls, as strict as the models.

Bodies are checked against the models of kfp_server_api (an unknown key is an error), uploaded
pipelines against the protobuf of the intermediate representation. Failures are ordered in advance.
"""

from __future__ import annotations

import email.parser
import email.policy
import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

import kfp_server_api
import yaml
from google.protobuf import json_format
from kfp.pipeline_spec import pipeline_spec_pb2

API = "/apis/v2beta1"
ROBFIG_FIELD = re.compile(
    r"^[0-9a-z*?]+(-[0-9a-z]+)?(/[0-9]+)?(,[0-9a-z*?]+(-[0-9a-z]+)?(/[0-9]+)?)*$"
)


class Refused(Exception):
    """An error answer."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass
class Failure:
    """What to answer instead, the next `times` times that a request matches."""

    method: str
    path: str
    status: int
    times: int = 1
    message: str = "ordered by the test"
    headers: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    """Delay before the answer."""
    is_done: bool = False
    """Whether the request is carried out all the same: its answer is lost."""


@dataclass
class Asked:
    """A request as it arrived."""

    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


def check(value: Any, kind: str, path: str = "body") -> None:
    """Refuse what the generated models do not know: unknown keys, wrong types, unknown words."""
    if kind.startswith("list["):
        for number, item in enumerate(value):
            check(item, kind[5:-1], f"{path}[{number}]")
        return
    if kind.startswith("dict("):
        inner = kind[5:-1].split(", ", 1)[1]
        for key, item in value.items():
            check(item, inner, f"{path}.{key}")
        return
    plain = {"str": str, "int": int, "bool": bool, "float": float, "datetime": str}
    if kind in plain or kind == "object":
        # protobuf's JSON takes 64-bit integers as numbers and as strings
        is_long = kind == "str" and isinstance(value, int)
        if kind != "object" and not isinstance(value, plain[kind]) and not is_long:
            raise Refused(400, f"{path} is {value!r}, wanted {kind}")
        return
    model = getattr(kfp_server_api, kind)
    if hasattr(model, "allowable_values"):
        if value not in model.allowable_values:
            raise Refused(400, f"{path} is {value!r}, wanted one of {model.allowable_values}")
        return
    names = {wire: name for name, wire in model.attribute_map.items()}
    unknown = set(value) - set(names)
    if unknown:
        raise Refused(400, f"{path} has unknown keys {sorted(unknown)}")
    for key, item in value.items():
        check(item, model.openapi_types[names[key]], f"{path}.{key}")


def parse_pipeline(content: bytes) -> pipeline_spec_pb2.PipelineSpec:
    """Read an uploaded pipeline as strictly as its protobuf."""
    documents = list(yaml.safe_load_all(content))
    if not 1 <= len(documents) <= 2:
        raise Refused(400, f"{len(documents)} documents in the package")
    try:
        spec = json_format.ParseDict(documents[0], pipeline_spec_pb2.PipelineSpec())
        for platform in documents[1:]:
            json_format.ParseDict(platform, pipeline_spec_pb2.PlatformSpec())
    except json_format.ParseError as error:
        raise Refused(400, f"not a pipeline: {error}") from error
    return spec


class KfpServer:
    """The server's content and behaviour."""

    def __init__(self) -> None:
        self.token = ""
        self.cookie = ""
        self.namespace = ""
        self.asked: list[Asked] = []
        self.failures: list[Failure] = []
        self.pipelines: dict[str, dict[str, Any]] = {}
        self.versions: dict[str, dict[str, Any]] = {}
        self.packages: dict[str, bytes] = {}
        self.experiments: dict[str, dict[str, Any]] = {}
        self.runs: dict[str, dict[str, Any]] = {}
        self.recurring: dict[str, dict[str, Any]] = {}
        self.scripts: dict[str, list[dict[str, Any]]] = {}
        """For each run, what is changed in it before each of the next answers."""
        self.first_script: list[dict[str, Any]] = []
        """The same for the next run that is made."""
        self.logs: dict[str, str] = {}
        """By pod name, as the API server gives them."""
        self.ui_logs: dict[str, str] = {}
        """By pod name, as the user interface's server gives them."""
        self.most_live = 0
        """Largest number of enabled recurring runs of one name at any time."""
        self.url = ""
        self._count = 0
        self._lock = threading.Lock()

    def id(self, kind: str) -> str:
        self._count += 1
        return f"{kind}-{self._count:04d}"

    def fail(self, method: str, path: str, status: int, **more: Any) -> None:
        self.failures.append(Failure(method=method, path=path, status=status, **more))

    def count(self, method: str, path: str) -> int:
        return sum(
            a.method == method and re.fullmatch(path, a.path) is not None for a in self.asked
        )

    def add_run(self, *changes: dict[str, Any], name: str = "demo") -> str:
        """A run that goes through these states, one for each time it is asked for."""
        run_id = self.id("run")
        self.runs[run_id] = {"run_id": run_id, "display_name": name, "state": "PENDING"}
        self.scripts[run_id] = list(changes)
        return run_id

    # --- the calls

    def answer(self, asked: Asked) -> tuple[int, Any]:
        self._authenticate(asked)
        for method, pattern, call in ROUTES:
            match = re.fullmatch(pattern, asked.path)
            if method == asked.method and match:
                with self._lock:
                    result = call(self, asked, *match.groups())
                    self._count_live()
                return 200, result
        raise Refused(404, f"no route {asked.method} {asked.path}")

    def _count_live(self) -> None:
        live: dict[str, int] = {}
        for item in self.recurring.values():
            if item["status"] == "ENABLED":
                live[item["display_name"]] = live.get(item["display_name"], 0) + 1
        self.most_live = max([self.most_live, *live.values()])

    def _authenticate(self, asked: Asked) -> None:
        if self.token and asked.headers.get("authorization") != f"Bearer {self.token}":
            sent = asked.headers.get("authorization", "none")
            raise Refused(401, f"Unauthenticated: {sent}")
        if self.cookie and asked.headers.get("cookie") != self.cookie:
            raise Refused(401, f"Unauthenticated: {asked.headers.get('cookie', 'none')}")

    def _listed(self, asked: Asked, items: list[dict[str, Any]], key: str) -> dict[str, Any]:
        """A page of what matches the filter."""
        if self.namespace and asked.query.get("namespace", "") != self.namespace:
            raise Refused(
                403, f"User is not authorized in namespace {asked.query.get('namespace')!r}"
            )
        wanted = json.loads(asked.query.get("filter") or '{"predicates": []}')
        for predicate in wanted["predicates"]:
            assert predicate["operation"] == 1 and predicate["key"] == "display_name", predicate
            items = [item for item in items if item["display_name"] == predicate["stringValue"]]
        if asked.query.get("sort_by") == "created_at desc":
            items = items[::-1]
        start = int(asked.query.get("page_token") or 0)
        size = min(int(asked.query.get("page_size") or 10), 200)
        page = {key: items[start : start + size], "total_size": len(items)}
        if start + size < len(items):
            page["next_page_token"] = str(start + size)
        return page

    def list_pipelines(self, asked: Asked) -> Any:
        return self._listed(asked, list(self.pipelines.values()), "pipelines")

    def create_pipeline(self, asked: Asked) -> Any:
        body = asked.json
        check(body, "V2beta1Pipeline")
        if any(item["display_name"] == body["display_name"] for item in self.pipelines.values()):
            raise Refused(409, f"The name {body['display_name']} already exists")
        made = {**body, "pipeline_id": self.id("pipeline")}
        self.pipelines[made["pipeline_id"]] = made
        return made

    def list_versions(self, asked: Asked, pipeline: str) -> Any:
        found = [v for v in self.versions.values() if v["pipeline_id"] == pipeline]
        asked.query.setdefault("namespace", self.namespace)
        return self._listed(asked, found, "pipeline_versions")

    def upload_version(self, asked: Asked) -> Any:
        name, pipeline = asked.query["name"], asked.query["pipelineid"]
        if pipeline not in self.pipelines:
            raise Refused(404, f"Pipeline {pipeline} not found")
        if any(
            v["display_name"] == name and v["pipeline_id"] == pipeline
            for v in self.versions.values()
        ):
            raise Refused(409, f"The version {name} already exists")
        content = uploaded_file(asked)
        parse_pipeline(content)
        made = {
            "pipeline_id": pipeline,
            "pipeline_version_id": self.id("version"),
            "display_name": name,
            "pipeline_spec": dict(
                zip(("pipeline_spec", "platform_spec"), yaml.safe_load_all(content), strict=False)
            ),
        }
        self.versions[made["pipeline_version_id"]] = made
        self.packages[made["pipeline_version_id"]] = content
        return made

    def list_experiments(self, asked: Asked) -> Any:
        return self._listed(asked, list(self.experiments.values()), "experiments")

    def create_experiment(self, asked: Asked) -> Any:
        body = asked.json
        check(body, "V2beta1Experiment")
        if any(e["display_name"] == body["display_name"] for e in self.experiments.values()):
            raise Refused(409, f"Experiment {body['display_name']} already exists")
        made = {**body, "experiment_id": self.id("experiment")}
        self.experiments[made["experiment_id"]] = made
        return made

    def _check_started(self, body: dict[str, Any]) -> None:
        """Version, experiment and parameters fit, as the server sees to it."""
        reference = body["pipeline_version_reference"]
        version = self.versions.get(reference["pipeline_version_id"])
        if version is None or version["pipeline_id"] != reference["pipeline_id"]:
            raise Refused(404, f"Version {reference} not found")
        if body["experiment_id"] not in self.experiments:
            raise Refused(404, f"Experiment {body['experiment_id']} not found")
        spec = parse_pipeline(self.packages[reference["pipeline_version_id"]])
        known = set(spec.root.input_definitions.parameters)
        unknown = set(body.get("runtime_config", {}).get("parameters", {})) - known
        if unknown:
            raise Refused(400, f"parameters {sorted(unknown)} are not in the pipeline")

    def create_run(self, asked: Asked) -> Any:
        body = asked.json
        check(body, "V2beta1Run")
        self._check_started(body)
        made = {**body, "run_id": self.id("run"), "state": "PENDING"}
        self.runs[made["run_id"]] = made
        self.scripts[made["run_id"]], self.first_script = self.first_script, []
        return made

    def get_run(self, asked: Asked, run_id: str) -> Any:
        if run_id not in self.runs:
            raise Refused(404, f"Run {run_id} not found")
        script = self.scripts.get(run_id)
        if script:
            self.runs[run_id].update(script.pop(0))
        check(self.runs[run_id], "V2beta1Run")
        return self.runs[run_id]

    def terminate_run(self, asked: Asked, run_id: str) -> Any:
        if self.runs[run_id]["state"] not in ("PENDING", "RUNNING"):
            raise Refused(400, f"Run {run_id} has ended")
        self.runs[run_id]["state"] = "CANCELING"
        self.scripts[run_id] = [{}, {"state": "CANCELED"}]
        return {}

    def list_recurring(self, asked: Asked) -> Any:
        return self._listed(asked, list(self.recurring.values()), "recurringRuns")

    def create_recurring(self, asked: Asked) -> Any:
        body = asked.json
        check(body, "V2beta1RecurringRun")
        self._check_started(body)
        if not 1 <= int(body["max_concurrency"]) <= 10:
            raise Refused(400, "Max concurrency must be at least 1 and at most 10")
        cron = body["trigger"]["cron_schedule"]["cron"]
        if len(cron.split()) != 6 or not all(ROBFIG_FIELD.match(f) for f in cron.split()):
            raise Refused(400, f"Schedule cron is not a supported format: {cron}")
        made = {
            **body,
            "recurring_run_id": self.id("recurring"),
            "status": "ENABLED" if body["mode"] == "ENABLE" else "DISABLED",
        }
        self.recurring[made["recurring_run_id"]] = made
        return made

    def _recurring(self, key: str) -> dict[str, Any]:
        if key not in self.recurring:
            raise Refused(404, f"Recurring run {key} not found")
        return self.recurring[key]

    def get_recurring(self, asked: Asked, key: str) -> Any:
        return self._recurring(key)

    def delete_recurring(self, asked: Asked, key: str) -> Any:
        self._recurring(key)
        del self.recurring[key]
        return {}

    def enable_recurring(self, asked: Asked, key: str) -> Any:
        self._recurring(key).update(status="ENABLED", mode="ENABLE")
        return {}

    def disable_recurring(self, asked: Asked, key: str) -> Any:
        self._recurring(key).update(status="DISABLED", mode="DISABLE")
        return {}

    def read_log(self, asked: Asked, run_id: str, pod: str) -> Any:
        if pod not in self.logs:
            raise Refused(500, f"Failed to read logs for run {run_id}")
        return self.logs[pod].encode()

    def read_ui_log(self, asked: Asked) -> Any:
        pod = asked.query["podname"]
        if pod not in self.ui_logs:
            raise Refused(404, "pod not found")
        return self.ui_logs[pod].encode()


ONE = "([^/:]+)"
ROUTES = (
    ("GET", f"{API}/pipelines", KfpServer.list_pipelines),
    ("POST", f"{API}/pipelines", KfpServer.create_pipeline),
    ("GET", f"{API}/pipelines/{ONE}/versions", KfpServer.list_versions),
    ("POST", f"{API}/pipelines/upload_version", KfpServer.upload_version),
    ("GET", f"{API}/experiments", KfpServer.list_experiments),
    ("POST", f"{API}/experiments", KfpServer.create_experiment),
    ("POST", f"{API}/runs", KfpServer.create_run),
    ("GET", f"{API}/runs/{ONE}", KfpServer.get_run),
    ("POST", f"{API}/runs/{ONE}:terminate", KfpServer.terminate_run),
    ("GET", f"{API}/recurringruns", KfpServer.list_recurring),
    ("POST", f"{API}/recurringruns", KfpServer.create_recurring),
    ("GET", f"{API}/recurringruns/{ONE}", KfpServer.get_recurring),
    ("DELETE", f"{API}/recurringruns/{ONE}", KfpServer.delete_recurring),
    ("POST", f"{API}/recurringruns/{ONE}:enable", KfpServer.enable_recurring),
    ("POST", f"{API}/recurringruns/{ONE}:disable", KfpServer.disable_recurring),
    ("GET", f"/apis/v1alpha1/runs/{ONE}/nodes/{ONE}/log", KfpServer.read_log),
    ("GET", "/k8s/pod/logs", KfpServer.read_ui_log),
)


def uploaded_file(asked: Asked) -> bytes:
    """The file in a multipart body."""
    head = f"Content-Type: {asked.headers['content-type']}\r\n\r\n".encode()
    message = email.parser.BytesParser(policy=email.policy.HTTP).parsebytes(head + asked.body)
    parts = [part for part in message.iter_parts() if part.get_filename()]  # type: ignore[attr-defined]
    if len(parts) != 1:
        raise Refused(400, f"{len(parts)} files in the upload")
    return bytes(parts[0].get_payload(decode=True))


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1  # head and body in one packet
    content: KfpServer

    def _handle(self) -> None:
        parts = urlsplit(self.path)
        asked = Asked(
            method=self.command,
            path=parts.path,
            query={key: values[0] for key, values in parse_qs(parts.query).items()},
            headers={key.lower(): value for key, value in self.headers.items()},
            body=self.rfile.read(int(self.headers.get("Content-Length") or 0)),
        )
        self.content.asked.append(asked)
        failure = self._failure(asked)
        try:
            if failure is None or failure.is_done:
                status, result = self.content.answer(asked)
            if failure is not None:
                time.sleep(failure.seconds)
                raise Refused(failure.status, failure.message)
        except Refused as error:
            status = error.status
            result = {"error": str(error), "message": str(error), "code": 2, "details": []}
        self._send(status, result, failure.headers if failure else {})

    def _failure(self, asked: Asked) -> Failure | None:
        for failure in self.content.failures:
            matches = re.fullmatch(failure.path, asked.path) and failure.method == asked.method
            if matches and failure.times > 0:
                failure.times -= 1
                return failure
        return None

    def _send(self, status: int, result: Any, headers: dict[str, str]) -> None:
        is_text = isinstance(result, bytes)
        content = result if is_text else json.dumps(result).encode()
        kind = "text/plain" if is_text else "application/json"
        try:
            self.send_response(status)
            for key, value in {"Content-Type": kind, **headers}.items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)
            self.wfile.flush()
        except (BrokenPipeError, ConnectionResetError):  # the client's time-out passed
            self.close_connection = True

    def do_GET(self) -> None:
        self._handle()

    def do_POST(self) -> None:
        self._handle()

    def do_DELETE(self) -> None:
        self._handle()

    def log_message(self, *_: object) -> None:
        return


@contextmanager
def running_server() -> Iterator[KfpServer]:
    """A server on loopback for as long as the context lasts."""
    content = KfpServer()
    handler = type("Handler", (_Handler,), {"content": content})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    content.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield content
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def stage_details(*stages: tuple[str, str], reason: str = "") -> dict[str, Any]:
    """Details of a run as the server gives them: for each stage a driver, a task and its pod."""
    began = datetime(2026, 11, 1, 3, 0, tzinfo=UTC)
    details: list[dict[str, Any]] = [
        {"task_id": "t-root", "display_name": "root", "state": "RUNNING"}
    ]
    for number, (name, state) in enumerate(stages):
        start = began + timedelta(minutes=10 * number)
        times = {
            "create_time": start.isoformat(),
            "start_time": start.isoformat(),
            "end_time": (start + timedelta(minutes=9)).isoformat(),
        }
        after = [{"pod_name": f"demo-x1-{number + 1}0"}] if number + 1 < len(stages) else []
        details += [
            {
                **times,
                "task_id": f"t-{number}d",
                "display_name": f"{name}-driver",
                "state": "SUCCEEDED",
                "pod_name": f"demo-x1-{number}9",
            },
            {
                **times,
                "task_id": f"t-{number}",
                "display_name": name,
                "state": state,
                "pod_name": f"demo-x1-{number}0",
                "child_tasks": [{"pod_name": f"demo-x1-{number}1"}, *after],
            },
            {
                **times,
                "task_id": f"t-{number}e",
                "display_name": "executor",
                "state": state,
                "pod_name": f"demo-x1-{number}1",
            },
        ]
        if state == "FAILED" and reason:
            details[-1]["error"] = {"code": 2, "message": reason}
    return {"run_details": {"task_details": details}}
