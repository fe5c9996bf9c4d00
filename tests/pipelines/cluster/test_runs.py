from __future__ import annotations

import json
import time

import kfp
import pytest

from dinov2_core.errors import InputError, PipelinesRefused, PipelinesUnavailable
from pipelines.cluster.client import RetryPolicy, connect
from pipelines.cluster.runs import PollingPolicy, RunState, cancel, logs, state_of, wait
from tests.pipelines.kfp_server import API, KfpServer, stage_details

QUICK = RetryPolicy(timeout_seconds=5.0, max_retries=1, backoff_seconds=0.01)
OFTEN = PollingPolicy(
    first_seconds=0.01, longest_seconds=0.02, outage_seconds=5.0, timeout_seconds=20.0
)


@pytest.fixture
def client(server: KfpServer) -> kfp.Client:
    return connect(server.url, retry_policy=QUICK)


@pytest.mark.parametrize("end", ["SUCCEEDED", "FAILED", "CANCELED", "SKIPPED"])
def test_waiting_ends_on_every_end(server: KfpServer, client: kfp.Client, end: str) -> None:
    run_id = server.add_run({}, {"state": "RUNNING"}, {"state": end})
    assert wait(client, run_id, policy=OFTEN).state == end


@pytest.mark.parametrize("state", ["PENDING", "RUNNING", "PAUSED", "CANCELING"])
def test_waiting_goes_on_in_every_other_state(
    server: KfpServer, client: kfp.Client, state: str
) -> None:
    run_id = server.add_run(*[{"state": state}] * 4, {"state": "SUCCEEDED"})
    wait(client, run_id, policy=OFTEN)
    assert server.count("GET", f"{API}/runs/{run_id}") == 5


def test_each_change_is_reported_once(server: KfpServer, client: kfp.Client) -> None:
    running = {"state": "RUNNING", **stage_details(("curate", "RUNNING"))}
    done = stage_details(("curate", "SUCCEEDED"), ("pretrain", "RUNNING"))
    run_id = server.add_run(running, running, done, done, {"state": "SUCCEEDED"})
    reported: list[RunState] = []
    wait(client, run_id, policy=OFTEN, on_change=reported.append)
    assert [[(task.name, task.state) for task in state.tasks] for state in reported] == [
        [("curate", "RUNNING")],
        [("curate", "SUCCEEDED"), ("pretrain", "RUNNING")],
        [("curate", "SUCCEEDED"), ("pretrain", "RUNNING")],
    ]


@pytest.mark.parametrize("status", [429, 500, 503])
def test_waiting_outlives_an_outage(server: KfpServer, client: kfp.Client, status: int) -> None:
    run_id = server.add_run({"state": "RUNNING"}, {"state": "SUCCEEDED"})
    server.fail("GET", f"{API}/runs/{run_id}", status, times=12)
    assert wait(client, run_id, policy=OFTEN).state == "SUCCEEDED"


def test_waiting_outlives_slow_answers(server: KfpServer) -> None:
    run_id = server.add_run({"state": "SUCCEEDED"})
    server.fail("GET", f"{API}/runs/{run_id}", 500, times=3, seconds=0.5)
    policy = RetryPolicy(timeout_seconds=0.1, max_retries=0)
    assert wait(connect(server.url, retry_policy=policy), run_id, policy=OFTEN).has_ended


def test_an_outage_that_lasts_is_raised(server: KfpServer, client: kfp.Client) -> None:
    run_id = server.add_run({"state": "RUNNING"})
    server.fail("GET", f"{API}/runs/{run_id}", 503, times=10_000)
    short = PollingPolicy(first_seconds=0.01, longest_seconds=0.01, outage_seconds=0.2)
    with pytest.raises(PipelinesUnavailable, match="HTTP 503"):
        wait(client, run_id, policy=short)


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_refusal_ends_the_wait_at_once(
    server: KfpServer, client: kfp.Client, status: int
) -> None:
    run_id = server.add_run({"state": "RUNNING"})
    server.fail("GET", f"{API}/runs/{run_id}", status)
    with pytest.raises(PipelinesRefused, match=f"HTTP {status}"):
        wait(client, run_id, policy=OFTEN)


def test_waiting_has_a_limit(server: KfpServer, client: kfp.Client) -> None:
    run_id = server.add_run({"state": "RUNNING"})
    limited = PollingPolicy(first_seconds=0.01, longest_seconds=0.01, timeout_seconds=0.2)
    with pytest.raises(TimeoutError, match=f"dinopipe wait {run_id}"):
        wait(client, run_id, policy=limited)


def test_pauses_grow_while_nothing_changes(server: KfpServer, client: kfp.Client) -> None:
    run_id = server.add_run(*[{"state": "RUNNING"}] * 5, {"state": "SUCCEEDED"})
    began = time.monotonic()
    wait(client, run_id, policy=PollingPolicy(first_seconds=0.05, longest_seconds=0.1))
    # 0.05, 0.075, 0.1, 0.1, 0.1 after the five answers that are not the end
    assert time.monotonic() - began >= 0.4


def test_an_unknown_run_is_refused(client: kfp.Client) -> None:
    with pytest.raises(PipelinesRefused, match="does not know it .*Run nope not found"):
        state_of(client, "nope")


def test_stages_come_in_order_with_reason_duration_and_pod(
    server: KfpServer, client: kfp.Client
) -> None:
    details = stage_details(("pretrain", "FAILED"), reason="OOMKilled\n (exit code 137)")
    earlier = stage_details(("curate", "SUCCEEDED"))["run_details"]["task_details"][2:3]
    details["run_details"]["task_details"] += earlier
    state = state_of(client, server.add_run({"state": "FAILED", **details}))
    assert [task.name for task in state.tasks] == ["curate", "pretrain"]
    failed = state.failed_task
    assert failed is not None
    assert failed.name == "pretrain"
    assert failed.reason == "OOMKilled (exit code 137)"
    assert failed.seconds == 540.0
    assert failed.pods == ("demo-x1-01",)


def test_a_stage_ends_where_the_next_begins(server: KfpServer, client: kfp.Client) -> None:
    """In Argo a task's children are also the tasks that follow it."""
    details = stage_details(("curate", "SUCCEEDED"), ("pretrain", "FAILED"), reason="lost")
    state = state_of(client, server.add_run({"state": "FAILED", **details}))
    assert [(task.name, task.reason, task.pods) for task in state.tasks] == [
        ("curate", "", ("demo-x1-01",)),
        ("pretrain", "lost", ("demo-x1-11",)),
    ]


def test_the_last_attempt_of_a_retried_stage_comes_last(
    server: KfpServer, client: kfp.Client
) -> None:
    details = stage_details(("pretrain", "RUNNING"))
    tasks = details["run_details"]["task_details"]
    first = tasks[-1]
    retry = {**first, "display_name": "executor", "pod_name": "retry", "task_id": "t-r"}
    retry["child_tasks"] = [{"pod_name": "try-1"}, {"pod_name": "try-0"}]
    attempts = [
        {
            **first,
            "task_id": f"try-{n}",
            "pod_name": f"try-{n}",
            "start_time": f"2026-11-01T0{n}:00:00Z",
        }
        for n in (1, 0)
    ]
    tasks[-2]["child_tasks"] = [{"pod_name": "retry"}]
    tasks[-1:] = [retry, *attempts]
    state = state_of(client, server.add_run({"state": "RUNNING", **details}))
    assert state.tasks[0].pods == ("try-0", "try-1")


def test_a_run_without_details_has_no_stages(server: KfpServer, client: kfp.Client) -> None:
    state = state_of(client, server.add_run({"state": "FAILED", "error": {"message": "no quota"}}))
    assert (state.tasks, state.failed_task, state.reason) == ((), None, "no quota")


def test_a_reason_is_also_looked_for_in_the_history(server: KfpServer, client: kfp.Client) -> None:
    history = [{"state": "FAILED", "error": {"code": 1, "message": "evicted"}}]
    run_id = server.add_run({"state": "FAILED", "state_history": history})
    assert state_of(client, run_id).reason == "evicted"


class TestLogs:
    @pytest.fixture
    def run_id(self, server: KfpServer) -> str:
        return server.add_run({"state": "RUNNING", **stage_details(("curate", "RUNNING"))})

    def test_they_come_from_the_api_server(
        self, server: KfpServer, client: kfp.Client, run_id: str
    ) -> None:
        server.logs["demo-x1-01"] = "step 1\nstep 2\n"
        task = state_of(client, run_id).tasks[0]
        assert logs(client, task, run_id=run_id) == "step 1\nstep 2\n"

    def test_else_from_the_user_interface(
        self, server: KfpServer, client: kfp.Client, run_id: str
    ) -> None:
        server.ui_logs["demo-x1-01"] = "from the interface"
        task = state_of(client, run_id).tasks[0]
        assert logs(client, task, run_id=run_id, namespace="team") == "from the interface"
        assert server.asked[-1].query == {
            "podname": "demo-x1-01", "runid": run_id, "podnamespace": "team",
        }  # fmt: skip

    @pytest.mark.parametrize(
        "template",
        [
            "metadata-0-2-retry-system-container-impl",
            "metadata-0-4-system-container-impl",
            "system-container-impl",
        ],
    )
    def test_a_node_is_also_looked_for_by_the_name_of_its_pod(
        self, server: KfpServer, client: kfp.Client, run_id: str, template: str
    ) -> None:
        server.logs[f"demo-x1-{template}-01"] = "by pod"
        task = state_of(client, run_id).tasks[0]
        assert logs(client, task, run_id=run_id) == "by pod"

    def test_a_server_without_them_leaves_a_command(self, client: kfp.Client, run_id: str) -> None:
        task = state_of(client, run_id).tasks[0]
        command = (
            "kubectl logs -n team -l workflows.argoproj.io/workflow=demo-x1,dinopipe/stage=curate "
        )
        with pytest.raises(PipelinesRefused, match=command):
            logs(client, task, run_id=run_id, namespace="team")

    @pytest.mark.parametrize("path", ["/apis/v1alpha1/runs/.*", "/k8s/pod/logs"])
    def test_a_forbidden_log_names_the_missing_permission(
        self, server: KfpServer, client: kfp.Client, run_id: str, path: str
    ) -> None:
        task = state_of(client, run_id).tasks[0]
        server.fail("GET", path, 403)
        with pytest.raises(PipelinesRefused, match=r"does not allow this .*get on pods/log") as no:
            logs(client, task, run_id=run_id)
        assert no.value.status == 403

    def test_an_answer_that_holds_an_error_is_no_log(
        self, server: KfpServer, client: kfp.Client, run_id: str
    ) -> None:
        """Kubeflow 2.17 answers 200 with such an object; this is a recorded one, shortened."""
        message = "InternalServerError: Failed to get file reader: NoSuchKey"
        server.logs["demo-x1-01"] = json.dumps({"error_message": message, "error_details": "x"})
        task = state_of(client, run_id).tasks[0]
        with pytest.raises(PipelinesRefused, match=r"gives no log of curate \(.*NoSuchKey") as no:
            logs(client, task, run_id=run_id)
        assert no.value.status == 404

    def test_an_answer_that_holds_a_refusal_names_the_missing_permission(
        self, server: KfpServer, client: kfp.Client, run_id: str
    ) -> None:
        message = (
            'pods "demo-x1-01" is forbidden: User "system:serviceaccount:kubeflow:ml-pipeline" '
            'cannot get resource "pods/log" in API group "" in the namespace "team"'
        )
        server.logs["demo-x1-01"] = json.dumps({"error_message": message, "error_details": ""})
        task = state_of(client, run_id).tasks[0]
        with pytest.raises(PipelinesRefused, match=r"ml-pipeline.*needs the verbs get on pods/log"):
            logs(client, task, run_id=run_id)

    def test_a_stage_without_pod_has_none(self, server: KfpServer, client: kfp.Client) -> None:
        details = stage_details(("curate", "PENDING"))
        del details["run_details"]["task_details"][2]["child_tasks"]
        del details["run_details"]["task_details"][2]["pod_name"]
        run_id = server.add_run(details)
        with pytest.raises(InputError, match="curate has no pod yet"):
            logs(client, state_of(client, run_id).tasks[0], run_id=run_id)


def test_a_running_run_is_canceled_and_seen_to_end(server: KfpServer, client: kfp.Client) -> None:
    run_id = server.add_run({"state": "RUNNING"})
    assert cancel(client, run_id).state == "RUNNING"
    assert wait(client, run_id, policy=OFTEN).state == "CANCELED"


def test_a_run_that_has_ended_is_left_alone(server: KfpServer, client: kfp.Client) -> None:
    run_id = server.add_run({"state": "SUCCEEDED"})
    assert cancel(client, run_id).has_ended
    assert server.count("POST", ".*:terminate") == 0
