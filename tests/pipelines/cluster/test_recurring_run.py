from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import kfp
import pytest

from dinov2_core.errors import InputError, PipelinesRefused, PipelinesUnavailable, SettingsError
from k8s.placement import Volume
from pipelines.cluster import recurring_run as schedule
from pipelines.cluster.client import RetryPolicy, connect
from pipelines.cluster.submit import Target
from pipelines.spec.pipeline_spec import PipelineSpec, load_spec
from pipelines.spec.problems import SpecError
from tests.pipelines.kfp_server import API, KfpServer
from tests.pipelines.specs import changed, small_values, write_spec

QUICK = RetryPolicy(timeout_seconds=5.0, max_retries=2, backoff_seconds=0.01)
TARGET = Target(
    workdir="/mnt/dinopipe", volume=Volume(claim="dinopipe-work", mount_path="/mnt/dinopipe")
)
RUNS = f"{API}/recurringruns"


def a_spec(folder: Path, **changes: Any) -> PipelineSpec:
    values = small_values("s3://bucket/pile")
    values["schedule"] = {"cron": "0 3 * * 1"}
    return load_spec(write_spec(changed(values, changes), folder / "spec.yaml"))


@pytest.fixture
def spec(tmp_path: Path) -> PipelineSpec:
    return a_spec(tmp_path)


@pytest.fixture
def client(server: KfpServer) -> kfp.Client:
    return connect(server.url, retry_policy=QUICK)


def only(server: KfpServer) -> dict[str, Any]:
    (item,) = server.recurring.values()
    return item


def test_one_recurring_run_is_made_as_the_spec_says(
    server: KfpServer, client: kfp.Client, spec: PipelineSpec
) -> None:
    item, outcome = schedule.apply(client, spec, TARGET)
    made = only(server)
    assert (outcome, item.is_enabled, item.cron) == ("created", True, "0 0 3 * * 1")
    assert made["trigger"] == {"cron_schedule": {"cron": "0 0 3 * * 1"}}
    assert made["no_catchup"] is True
    assert int(made["max_concurrency"]) == 1
    assert made["display_name"] == "dinopipe-demo"
    (version,) = server.versions.values()
    assert (
        made["pipeline_version_reference"]["pipeline_version_id"] == version["pipeline_version_id"]
    )
    assert json.loads(made["runtime_config"]["parameters"]["context"])["use_cache"] is True


def test_the_same_spec_twice_changes_nothing(
    server: KfpServer, client: kfp.Client, spec: PipelineSpec
) -> None:
    first, _ = schedule.apply(client, spec, TARGET)
    asked = len(server.asked)
    second, outcome = schedule.apply(client, spec, TARGET)
    assert (outcome, second.recurring_run_id) == ("unchanged", first.recurring_run_id)
    assert {request.method for request in server.asked[asked:]} == {"GET"}


@pytest.mark.parametrize(
    "changes",
    [
        {"schedule__cron": "0 4 * * 1"},
        {"schedule__cron": "0 3 * * 1", "schedule__time_zone": "Asia/Tokyo"},
        {"schedule__max_concurrency": 2},
        {"schedule__catch_up": True},
        {"use_cache": False},
        {"finetune__num_steps": 5},
        {"tracking": {"experiment": "other"}},
    ],
)
def test_any_change_replaces_it_without_two_alive(
    server: KfpServer, client: kfp.Client, tmp_path: Path, changes: dict[str, Any]
) -> None:
    first, _ = schedule.apply(client, a_spec(tmp_path), TARGET)
    second, outcome = schedule.apply(client, a_spec(tmp_path, **changes), TARGET)
    assert outcome == "replaced"
    assert only(server)["recurring_run_id"] == second.recurring_run_id != first.recurring_run_id
    assert second.is_enabled
    assert server.most_live == 1


def test_another_target_replaces_it_too(
    server: KfpServer, client: kfp.Client, spec: PipelineSpec
) -> None:
    elsewhere = Volume(claim="other", mount_path="/mnt/dinopipe")
    schedule.apply(client, spec, TARGET)
    _, outcome = schedule.apply(client, spec, Target(workdir="/mnt/dinopipe", volume=elsewhere))
    assert outcome == "replaced"


def test_other_peoples_recurring_runs_are_left_alone(
    server: KfpServer, client: kfp.Client, spec: PipelineSpec, tmp_path: Path
) -> None:
    for key, name in (("a", "dinopipe-demo"), ("b", "nightly")):
        server.recurring[key] = {
            "recurring_run_id": key, "display_name": name, "description": "by hand", "status": "ENABLED",
        }  # fmt: skip
    schedule.apply(client, spec, TARGET)
    schedule.apply(client, a_spec(tmp_path, schedule__cron="0 4 * * 1"), TARGET)
    assert {"a", "b"} < set(server.recurring)
    assert len(schedule.recurring_runs(client)) == 1
    schedule.delete(client, spec)
    assert set(server.recurring) == {"a", "b"}


@pytest.mark.parametrize("step", ["POST", "DELETE", "ENABLE"])
def test_a_broken_replacement_is_mended_by_doing_it_again(
    server: KfpServer, client: kfp.Client, tmp_path: Path, step: str
) -> None:
    schedule.apply(client, a_spec(tmp_path), TARGET)
    if step == "ENABLE":
        server.fail("POST", f"{RUNS}/.*:enable", 500, times=3)
    else:
        server.fail(
            step, f"{RUNS}.*", 500, times=3 if step == "DELETE" else 1, is_done=step == "POST"
        )
    new = a_spec(tmp_path, schedule__cron="0 4 * * 1")
    with pytest.raises(PipelinesUnavailable, match="HTTP 500"):
        schedule.apply(client, new, TARGET)
    assert server.most_live == 1
    item, outcome = schedule.apply(client, new, TARGET)
    assert only(server)["trigger"]["cron_schedule"]["cron"] == "0 0 4 * * 1"
    assert server.most_live == 1
    if step == "ENABLE":  # looks like one that was paused, and says so
        assert (outcome, item.is_enabled) == ("unchanged", False)
    else:
        assert (outcome, item.is_enabled) == ("replaced", True)


def test_a_paused_schedule_stays_paused_when_the_spec_changes(
    server: KfpServer, client: kfp.Client, tmp_path: Path
) -> None:
    spec = a_spec(tmp_path)
    schedule.apply(client, spec, TARGET)
    assert not schedule.pause(client, spec).is_enabled
    item, outcome = schedule.apply(client, spec, TARGET)
    assert (outcome, item.is_enabled) == ("unchanged", False)
    item, outcome = schedule.apply(client, a_spec(tmp_path, schedule__cron="0 4 * * 1"), TARGET)
    assert (outcome, item.is_enabled, only(server)["status"]) == ("replaced", False, "DISABLED")


def test_resuming_makes_it_anew_so_that_nothing_missed_is_fired(
    server: KfpServer, client: kfp.Client, spec: PipelineSpec
) -> None:
    schedule.apply(client, spec, TARGET)
    before = dict(only(server))
    schedule.pause(client, spec)
    assert schedule.resume(client, spec).is_enabled
    after = only(server)
    new = {"recurring_run_id", "status", "mode"}
    assert after["recurring_run_id"] != before["recurring_run_id"]
    assert {k: str(v) for k, v in after.items() if k not in new} == {
        k: str(v) for k, v in before.items() if k not in new
    }
    assert server.count("POST", f"{RUNS}/.*:enable") == 0
    assert schedule.apply(client, spec, TARGET)[1] == "unchanged"


def test_resuming_what_runs_changes_nothing(
    server: KfpServer, client: kfp.Client, spec: PipelineSpec
) -> None:
    first, _ = schedule.apply(client, spec, TARGET)
    assert schedule.resume(client, spec) == first
    assert len(server.recurring) == 1


def test_deleting_removes_it_even_if_somebody_was_faster(
    server: KfpServer, client: kfp.Client, spec: PipelineSpec
) -> None:
    schedule.apply(client, spec, TARGET)
    server.fail("DELETE", f"{RUNS}/.*", 500, is_done=True)  # repeated, and then answered with 404
    schedule.delete(client, spec)
    assert server.recurring == {}


@pytest.mark.parametrize("change", [schedule.pause, schedule.resume, schedule.delete])
def test_a_missing_schedule_is_an_error(
    client: kfp.Client, spec: PipelineSpec, change: Any
) -> None:
    with pytest.raises(InputError, match="there is no schedule dinopipe-demo"):
        change(client, spec)


def test_a_forbidden_change_is_refused(
    server: KfpServer, client: kfp.Client, spec: PipelineSpec
) -> None:
    schedule.apply(client, spec, TARGET)
    server.fail("DELETE", f"{RUNS}/.*", 403)
    with pytest.raises(PipelinesRefused, match="does not allow this"):
        schedule.delete(client, spec)


def test_a_spec_without_schedule_is_refused_with_an_example(
    client: kfp.Client, tmp_path: Path
) -> None:
    with pytest.raises(SettingsError, match=r"has no schedule; add to the spec.*schedule: \{cron"):
        schedule.apply(client, a_spec(tmp_path, schedule=None), TARGET)


def test_a_spec_of_this_machine_is_not_scheduled(
    server: KfpServer, client: kfp.Client, tmp_path: Path
) -> None:
    (tmp_path / "pile").mkdir()
    with pytest.raises(SpecError, match="lies on this machine"):
        schedule.apply(client, a_spec(tmp_path, images={"uri": "pile"}), TARGET)
    assert server.asked == []


def test_all_pages_are_listed(server: KfpServer, client: kfp.Client) -> None:
    for number in range(250):
        server.recurring[str(number)] = {
            "recurring_run_id": str(number), "display_name": f"dinopipe-{number}",
            "description": f"{schedule.DESCRIPTION_PREFIX}0: '@daily' UTC", "status": "ENABLED",
        }  # fmt: skip
    found = schedule.recurring_runs(client)
    assert len(found) == 250
    assert found[0].schedule == "'@daily' UTC"


def test_a_namespace_is_asked_for(server: KfpServer, spec: PipelineSpec) -> None:
    server.namespace = "team"
    client = connect(server.url, namespace="team", retry_policy=QUICK)
    schedule.apply(client, spec, TARGET)
    assert len(schedule.recurring_runs(client)) == 1


def test_busy_servers_are_asked_again(
    server: KfpServer, client: kfp.Client, spec: PipelineSpec
) -> None:
    server.fail("GET", RUNS, 503, times=2)
    server.fail("POST", RUNS, 429)
    assert schedule.apply(client, spec, TARGET)[1] == "created"
    assert len(server.recurring) == 1
