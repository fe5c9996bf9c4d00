from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from components.runtime.context import RunContext
from components.runtime.tracking import Tracker, TrackingUnreachable, check_reachable


def test_stages_are_nested_below_one_parent_and_continue_their_own_run(tracker: Tracker) -> None:
    first = tracker.stage("pretrain", key="k1")
    first.end("FAILED")
    again = Tracker(tracker.context).stage("pretrain", key="k1")
    other = tracker.stage("pretrain", key="k2")
    assert again.run_id == first.run_id != other.run_id
    run = tracker.client.get_run(first.run_id)
    assert run.info.status == "RUNNING"
    assert run.data.tags["mlflow.parentRunId"] == tracker.parent()


def test_the_parent_knows_versions_and_machine(tracker: Tracker) -> None:
    tags = tracker.client.get_run(tracker.parent()).data.tags
    assert tags["version.torch"].startswith("2.")
    assert int(tags["system.cpus"]) >= 1
    assert tags["dinopipe.run_id"] == tracker.context.run_id


def test_rows_of_many_steps_arrive_in_order(tracker: Tracker) -> None:
    run = tracker.stage("pretrain", key="rows")
    run.log_rows([(step, {"loss": 1 / (step + 1), "lr": 0.1}) for step in range(1000)])
    history = tracker.client.get_metric_history(run.run_id, "loss")
    assert [point.step for point in history] == list(range(1000))
    assert run.last_step("loss") == 999
    assert run.last_step("never") == -1


def test_settings_are_logged_once_with_dotted_names(tracker: Tracker) -> None:
    run = tracker.stage("curate", key="params")
    run.log_params({"a": {"b": 1}, "c": "x"})
    run.log_params({"a": {"b": 2}})  # a restart with another value must not raise
    assert tracker.client.get_run(run.run_id).data.params == {"a.b": "1", "c": "x"}


def test_a_dataset_is_logged_by_reference(tracker: Tracker) -> None:
    run = tracker.stage("curate", key="dataset")
    run.log_dataset(name="pile", uri="/data/shards", digest="d" * 64, context="pretraining")
    inputs = tracker.client.get_run(run.run_id).inputs.dataset_inputs
    assert inputs[0].dataset.name == "pile"
    assert inputs[0].dataset.digest == "d" * 32
    assert "/data/shards" in inputs[0].dataset.source


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(503 if self.server.sick else 200)  # type: ignore[attr-defined]
        self.end_headers()

    def log_message(self, *_: object) -> None:
        return


@pytest.fixture
def server() -> Iterator[HTTPServer]:
    server = HTTPServer(("127.0.0.1", 0), _Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


@pytest.mark.parametrize("sick", [False, True])
def test_a_servers_health_is_asked(server: HTTPServer, sick: bool) -> None:
    server.sick = sick  # type: ignore[attr-defined]
    uri = f"http://127.0.0.1:{server.server_port}"
    if not sick:
        check_reachable(uri)
        return
    with pytest.raises(TrackingUnreachable, match="answers HTTP 503 to /health"):
        check_reachable(uri)


def test_a_dead_or_silent_server_is_told_within_seconds() -> None:
    with pytest.raises(TrackingUnreachable, match=r"check tracking.uri, start the server"):
        check_reachable("http://127.0.0.1:9")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        started = time.monotonic()
        uri = f"http://me:hunter2@127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(TrackingUnreachable) as caught:
            check_reachable(uri, timeout_seconds=0.5)
        assert time.monotonic() - started < 3
        assert "hunter2" not in str(caught.value)


def test_connecting_fails_fast_too(context: RunContext) -> None:
    dead = context.model_copy(update={"tracking_uri": "http://127.0.0.1:9"})
    with pytest.raises(TrackingUnreachable):
        Tracker(dead)
