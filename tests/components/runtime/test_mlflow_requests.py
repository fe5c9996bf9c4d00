"""mlflow_requests: a server that is away is waited for, one that refuses is not."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import mlflow
import pytest
import requests
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INTERNAL_ERROR, RESOURCE_DOES_NOT_EXIST, ErrorCode

from components.runtime.context import RunContext
from components.runtime.metric_log import MetricLog
from components.runtime.mlflow_requests import ask_mlflow, check_reachable, is_absent
from components.runtime.retry import ONCE, RetryPolicy, retrying_with
from components.runtime.tracking import StageRun, Tracker
from dinov2_core.errors import StoreUnavailable, TrackingRefused, TrackingUnavailable, UserError
from tests.mlflow_server import mlflow_server
from tests.s3_server import BadLine

SHORT = RetryPolicy(total_seconds=20, first_pause_seconds=0.02, longest_pause_seconds=0.1)


@pytest.fixture(scope="module")
def server(shared_workdir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    store = f"sqlite:///{shared_workdir / 'mlflow.db'}"
    Tracker(RunContext(workdir=str(shared_workdir), run_id="r", run_name="r"))
    with pytest.MonkeyPatch.context() as patch:
        artifacts = tmp_path_factory.mktemp("artifacts")
        with mlflow_server(patch, store=store, directory=artifacts) as address:
            yield address


@pytest.fixture
def line(server: str) -> Iterator[tuple[BadLine, str]]:
    """A line to the server, without faults at first, and its address."""
    line = BadLine(server, faults=[], concerns=lambda method, path: "/health" not in path)
    with line.served() as address, retrying_with(SHORT):
        yield line, address


@pytest.fixture
def run(line: tuple[BadLine, str], context: RunContext) -> StageRun:
    remote = context.model_copy(update={"tracking_uri": line[1]})
    return Tracker(remote).stage("pretrain", key="k")


@pytest.mark.parametrize("fault", ["answer 503", "answer 500", "answer 429", "drop"])
def test_a_server_that_is_well_passes_and_one_that_is_not_is_unavailable(
    server: str, fault: str
) -> None:
    line = BadLine(server, faults=[fault], concerns=lambda *_: True)
    with line.served() as address:
        with pytest.raises(TrackingUnavailable, match="check tracking.uri, start the server"):
            check_reachable(address)
        check_reachable(address)


def test_an_address_of_something_else_is_refused(server: str) -> None:
    line = BadLine(server, faults=["answer 403"], concerns=lambda *_: True)
    with line.served() as address, pytest.raises(TrackingRefused, match="answers HTTP 403 to"):
        check_reachable(address)
    with pytest.raises(TrackingRefused, match="is no address"):
        check_reachable("http://")


def test_a_dead_or_silent_server_is_reported_within_seconds() -> None:
    with pytest.raises(TrackingUnavailable, match=r"check tracking.uri, start the server"):
        check_reachable("http://127.0.0.1:9")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        started = time.monotonic()
        uri = f"http://me:hunter2@127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(TrackingUnavailable) as caught:
            check_reachable(uri, timeout_seconds=0.5)
        assert time.monotonic() - started < 3
        assert "hunter2" not in str(caught.value)


def test_stages_wait_for_a_server_that_is_being_started(server: str, context: RunContext) -> None:
    line = BadLine(server, faults=["answer 503", "drop", "answer 503"], concerns=lambda *_: True)
    with line.served() as address, retrying_with(SHORT):
        Tracker(context.model_copy(update={"tracking_uri": address}))
    assert not line.faults


def test_a_server_that_stays_away_is_unavailable_and_no_user_error(context: RunContext) -> None:
    dead = context.model_copy(update={"tracking_uri": "http://me:hunter2@127.0.0.1:9"})
    with retrying_with(RetryPolicy.of(0.3)), pytest.raises(TrackingUnavailable) as caught:
        Tracker(dead)
    assert not isinstance(caught.value, UserError | ValueError)
    assert "hunter2" not in str(caught.value)


def requests_of(run: StageRun, tmp_path: Path) -> dict[str, Callable[[], object]]:
    (tmp_path / "file").write_text("x")
    return {
        "params": lambda: run.log_params({"a": 1}),
        "metrics": lambda: run.log_metrics({"loss": 0.5}),
        "tags": lambda: run.set_tags({"a": "b"}),
        "file": lambda: run.log_file(tmp_path / "file", folder=""),
        "last step": lambda: run.last_step("loss"),
        "end": lambda: run.end("FINISHED"),
    }


@pytest.mark.parametrize("request_name", ["params", "metrics", "tags", "last step", "end"])
def test_every_request_waits_for_a_server_that_is_away(
    line: tuple[BadLine, str], run: StageRun, request_name: str, tmp_path: Path
) -> None:
    request = requests_of(run, tmp_path)[request_name]
    line[0].faults = ["answer 503", "drop", "answer 500", "answer 429"]
    request()
    assert not line[0].faults
    line[0].faults = ["answer 502"] * 10**4
    with retrying_with(RetryPolicy.of(0.2)), pytest.raises(TrackingUnavailable):
        request()


@pytest.mark.parametrize("status", [400, 401, 403, 404])
def test_a_refusal_is_not_repeated(line: tuple[BadLine, str], run: StageRun, status: int) -> None:
    line[0].faults = [f"answer {status}"] * 2
    with pytest.raises(TrackingRefused) as refused:
        run.set_tags({"a": "b"})
    assert refused.value.status == status
    assert len(line[0].faults) == 1


def test_a_run_whose_creation_lost_its_answer_is_found_again(
    line: tuple[BadLine, str], context: RunContext
) -> None:
    bad, address = line
    remote = context.model_copy(update={"tracking_uri": address, "run_id": context.run_id + "-2"})
    tracker = Tracker(remote)
    bad._concerns = lambda method, path: path.endswith("runs/create")
    bad.faults = ["lose", "lose"]
    run = tracker.stage("curate", key="k")
    assert not bad.faults
    found = tracker.client.search_runs(
        [tracker.experiment_id], f"tags.`dinopipe.run_id` = '{remote.run_id}'"
    )
    assert len(found) == 2  # the pipeline's and the stage's
    assert run.run_id in {item.info.run_id for item in found}


def test_metrics_whose_answer_was_lost_are_there_once(
    line: tuple[BadLine, str], run: StageRun
) -> None:
    line[0].faults = ["lose"] * 3
    run.log_metrics({"loss": 0.5}, step=1)
    assert not line[0].faults
    assert len(run.client.get_metric_history(run.run_id, "loss")) == 1


def test_rows_are_tried_once_because_their_file_keeps_them(
    line: tuple[BadLine, str], run: StageRun, tmp_path: Path
) -> None:
    log = MetricLog(tmp_path / "metrics.jsonl", first_step=0, marker="loss")
    for step in range(3):
        log.add(step, {"loss": 1.0})
    log.flush()
    bad = line[0]
    bad.faults = ["answer 503"] * 2
    with pytest.raises(TrackingUnavailable):
        log.send(run)
    assert len(bad.faults) == 1
    bad._concerns = lambda method, path: path.endswith("log-batch")
    bad.faults = ["lose"] * 2
    for _ in range(2):
        with pytest.raises(TrackingUnavailable):
            log.send(run)
    log.send(run)
    history = run.client.get_metric_history(run.run_id, "loss")
    assert [point.step for point in history] == [0, 1, 2]


def test_errors_of_mlflow_s_client_keep_their_meaning_and_no_password() -> None:
    uri = "http://me:hunter2@mlflow:5000"
    cases: list[tuple[Exception, type[Exception]]] = [
        (MlflowException(f"API request to {uri} failed", error_code=INTERNAL_ERROR), TrackingUnavailable),
        (MlflowException("full", ErrorCode.Value("TEMPORARILY_UNAVAILABLE")), TrackingUnavailable),
        (MlflowException("slow down", ErrorCode.Value("REQUEST_LIMIT_EXCEEDED")), TrackingUnavailable),
        (MlflowException("no", ErrorCode.Value("PERMISSION_DENIED")), TrackingRefused),
        (MlflowException("?", ErrorCode.Value("INVALID_PARAMETER_VALUE")), TrackingRefused),
        (requests.ConnectionError(f"{uri} refused"), TrackingUnavailable),
        (requests.Timeout(uri), TrackingUnavailable),
        (ConnectionResetError("reset"), StoreUnavailable),
    ]  # fmt: skip
    for error, kind in cases:

        def fail(error: Exception = error) -> None:
            raise error

        with retrying_with(ONCE), pytest.raises(kind) as caught:
            ask_mlflow(fail, uri=uri)
        assert "hunter2" not in str(caught.value)


def test_what_does_not_exist_is_told_from_other_refusals() -> None:
    def absent() -> None:
        raise MlflowException("no such run", RESOURCE_DOES_NOT_EXIST)

    def other() -> None:
        raise MlflowException("404 page not found", ErrorCode.Value("ENDPOINT_NOT_FOUND"))

    for call, expected in ((absent, True), (other, False)):
        with pytest.raises(TrackingRefused) as refused:
            ask_mlflow(call, uri="sqlite:///x")
        assert is_absent(refused.value) == expected


def test_only_this_module_s_client_settings_decide_about_retries(server: str) -> None:
    """MLflow's own would repeat requests that must not be made twice."""
    assert mlflow.environment_variables.MLFLOW_HTTP_REQUEST_MAX_RETRIES.get() == 0
