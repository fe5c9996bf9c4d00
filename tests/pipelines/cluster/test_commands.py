from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from pipelines.__main__ import main
from tests.pipelines.kfp_server import API, KfpServer, stage_details
from tests.pipelines.specs import REPOSITORY, changed, small_values, write_spec

Output = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def environment(server: KfpServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shell that knows the server and nothing else of Kubeflow."""
    for name in [name for name in os.environ if name.startswith("KF_PIPELINES_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("KF_PIPELINES_ENDPOINT", server.url)


def a_spec(folder: Path, **changes: Any) -> str:
    values = small_values("s3://bucket/pile")
    values["schedule"] = {"cron": "0 3 * * 1"}
    return str(write_spec(changed(values, changes), folder / "spec.yaml"))


@pytest.fixture
def spec(tmp_path: Path) -> str:
    return a_spec(tmp_path)


def test_submit_prints_version_run_and_address(
    server: KfpServer, spec: str, capsys: Output
) -> None:
    assert main(["submit", spec]) == 0
    (run_id,) = server.runs
    output = capsys.readouterr()
    lines = output.out.splitlines()
    assert lines[0].startswith("version sha256-")
    assert lines[0].endswith("(new)")
    assert lines[1:] == [f"run {run_id}", f"{server.url}/#/runs/details/{run_id}"]
    assert "name it by digest" in output.err
    assert main(["submit", spec]) == 0
    assert "(known)" in capsys.readouterr().out


def test_submit_and_compile_write_the_same_pipeline(
    server: KfpServer, spec: str, tmp_path: Path
) -> None:
    assert main(["submit", spec, "--workdir", "/mnt/x", "--claim", "c"]) == 0
    output = tmp_path / "pipeline.yaml"
    assert main(["compile", spec, "-o", str(output), "--workdir", "/mnt/x", "--claim", "c"]) == 0
    (package,) = server.packages.values()
    assert package == output.read_bytes()


def test_no_cache_reaches_the_stages(server: KfpServer, spec: str) -> None:
    main(["submit", spec, "--no-cache"])
    (run,) = server.runs.values()
    assert '"use_cache":false' in run["runtime_config"]["parameters"]["context"]


def test_without_a_host_nothing_is_tried(
    server: KfpServer, spec: str, capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("KF_PIPELINES_ENDPOINT")
    for command in (["submit", spec], ["status", "r"], ["schedule", spec], ["schedules"]):
        assert main(command) == 2
        assert "no server to talk to; give --host" in capsys.readouterr().err
    assert server.asked == []


def test_a_wrong_spec_is_not_sent(server: KfpServer, tmp_path: Path, capsys: Output) -> None:
    assert main(["submit", a_spec(tmp_path, finetune__num_steps=-1)]) == 2
    assert "has 1 problem:" in capsys.readouterr().err
    assert server.asked == []


@pytest.mark.parametrize(("end", "code"), [("SUCCEEDED", 0), ("CANCELED", 1), ("SKIPPED", 1)])
def test_wait_gives_the_end_as_its_exit_code(
    server: KfpServer, capsys: Output, end: str, code: int
) -> None:
    details = stage_details(("curate", "SUCCEEDED"))
    run_id = server.add_run({"state": end, **details})
    assert main(["wait", run_id]) == code
    output = capsys.readouterr()
    assert output.out.splitlines() == ["  curate    SUCCEEDED     9.0 min", f"demo {end}"]
    assert (end in output.err) == (code == 1)


def test_wait_shows_why_a_stage_failed_and_its_last_lines(
    server: KfpServer, capsys: Output
) -> None:
    details = stage_details(("curate", "SUCCEEDED"), ("pretrain", "FAILED"), reason="exit code 1")
    run_id = server.add_run({"state": "FAILED", **details})
    server.logs["demo-x1-11"] = "".join(f"line {n}\n" for n in range(100))
    assert main(["wait", run_id]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "pretrain FAILED: exit code 1"
    assert lines[1:21] == [f"line {n}" for n in range(80, 100)]
    assert lines[21] == f"look at it: {server.url}/#/runs/details/{run_id}"


def test_wait_prints_a_command_if_there_is_no_log(server: KfpServer, capsys: Output) -> None:
    run_id = server.add_run({"state": "FAILED", **stage_details(("curate", "FAILED"))})
    assert main(["wait", run_id]) == 1
    error = capsys.readouterr().err
    assert "curate FAILED: the server gives no reason" in error
    assert "kubectl logs -l workflows.argoproj.io/workflow=demo-x1,dinopipe/stage=curate" in error


def test_submit_waits_if_asked(server: KfpServer, spec: str, capsys: Output) -> None:
    server.first_script = [{"state": "FAILED", "error": {"code": 3, "message": "no such claim"}}]
    assert main(["submit", spec, "--wait"]) == 1
    output = capsys.readouterr()
    assert "demo sha256-" in output.out
    assert "FAILED: no such claim" in output.err


def test_waiting_has_a_limit(server: KfpServer, capsys: Output) -> None:
    run_id = server.add_run({"state": "RUNNING"})
    assert main(["wait", run_id, "--timeout", "0"]) == 1
    assert f"dinopipe wait {run_id} takes up waiting again" in capsys.readouterr().err


def test_an_interrupted_wait_leaves_the_run_alone(server: KfpServer) -> None:
    run_id = server.add_run({"state": "RUNNING"})
    process = subprocess.Popen(
        [sys.executable, "-m", "pipelines", "wait", run_id],
        cwd=REPOSITORY, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    while not server.asked:
        assert process.poll() is None
        time.sleep(0.05)
    time.sleep(0.3)
    process.send_signal(2)
    _, error = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "the run goes on" in error
    assert server.count("POST", ".*") == 0


def test_status_shows_the_stages(server: KfpServer, capsys: Output) -> None:
    details = stage_details(("curate", "SUCCEEDED"), ("pretrain", "FAILED"), reason="OOMKilled")
    run_id = server.add_run({"state": "FAILED", **details})
    assert main(["status", run_id]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "demo FAILED",
        "  curate    SUCCEEDED     9.0 min",
        "  pretrain  FAILED        9.0 min  OOMKilled",
        f"{server.url}/#/runs/details/{run_id}",
    ]


def test_logs_are_those_of_the_stage_asked_for_or_of_the_failed_one(
    server: KfpServer, capsys: Output
) -> None:
    details = stage_details(
        ("curate", "SUCCEEDED"), ("pretrain", "FAILED"), ("finetune", "SKIPPED")
    )
    run_id = server.add_run({"state": "FAILED", **details})
    server.logs |= {"demo-x1-01": "of curate\n", "demo-x1-11": "of pretrain\n"}
    assert main(["logs", run_id]) == 0
    assert main(["logs", run_id, "--stage", "curate"]) == 0
    assert capsys.readouterr().out == "of pretrain\nof curate\n"
    assert main(["logs", run_id, "--stage", "register"]) == 2
    assert "has not begun register; it has begun curate" in capsys.readouterr().err
    assert main(["logs", server.add_run()]) == 2
    assert "has begun no stage yet (PENDING)" in capsys.readouterr().err


def test_cancel_stops_a_run_once(server: KfpServer, capsys: Output) -> None:
    run_id = server.add_run({"state": "RUNNING"})
    assert main(["cancel", run_id]) == 0
    assert "is being canceled" in capsys.readouterr().out
    assert main(["wait", run_id]) == 1
    assert main(["cancel", run_id]) == 0
    assert "had ended already: CANCELED" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["status", "wait", "logs", "cancel"])
def test_an_unknown_run_is_refused(command: str, capsys: Output) -> None:
    assert main([command, "nope"]) == 2
    assert "Run nope not found" in capsys.readouterr().err


def test_a_schedule_is_made_listed_paused_resumed_deleted(
    server: KfpServer, spec: str, capsys: Output
) -> None:
    def output_of(*command: str) -> str:
        assert main(list(command)) == 0
        return capsys.readouterr().out

    made = output_of("schedule", spec)
    assert "dinopipe-demo created: '0 3 * * 1' UTC  enabled" in made
    assert made.splitlines()[1].startswith("next: Mon ")
    assert made.count("03:00 UTC") == 3
    assert "unchanged" in output_of("schedule", spec)
    assert "dinopipe-demo  '0 3 * * 1' UTC  enabled" in output_of("schedules")
    assert f"paused; dinopipe schedule {spec} --resume" in output_of("schedule", spec, "--pause")
    assert "UTC  paused" in output_of("schedules")
    assert "resumed" in output_of("schedule", spec, "--resume")
    assert "deleted" in output_of("schedule", spec, "--delete")
    assert "nothing is scheduled" in output_of("schedules")
    assert server.recurring == {}
    assert main(["schedule", spec, "--pause"]) == 2
    assert "there is no schedule dinopipe-demo" in capsys.readouterr().err


def test_a_changed_cron_replaces_the_schedule(
    server: KfpServer, tmp_path: Path, capsys: Output
) -> None:
    main(["schedule", a_spec(tmp_path)])
    assert main(["schedule", a_spec(tmp_path, schedule__cron="@daily")]) == 0
    assert "dinopipe-demo replaced: '@daily' UTC  enabled" in capsys.readouterr().out
    assert len(server.recurring) == server.most_live == 1


def test_credentials_namespace_and_certificates_are_flags(
    server: KfpServer, spec: str, tmp_path: Path, capsys: Output
) -> None:
    token, cookie = tmp_path / "token", tmp_path / "cookie"
    token.write_text("of-a-file\n")
    cookie.write_text("session=of-a-file\n")
    server.token, server.namespace = "of-a-file", "team"
    assert main(["submit", spec, "--token-file", str(token), "--namespace", "team"]) == 0
    server.token, server.cookie = "", "session=of-a-file"
    assert main(["schedules", "--cookie-file", str(cookie), "--namespace", "team"]) == 0
    assert main(["schedules", "--namespace", "team"]) == 2
    assert "does not accept the credentials" in capsys.readouterr().err
    assert main(["schedules", "--ca-file", str(tmp_path / "none")]) == 2
    assert "--ca-file" in capsys.readouterr().err


def test_a_refusal_names_the_address(server: KfpServer, capsys: Output) -> None:
    run_id = server.add_run()
    server.fail("GET", f"{API}/runs/{run_id}", 403, message="no role")
    assert main(["status", run_id]) == 2
    assert f"{server.url} does not allow this (HTTP 403: no role)" in capsys.readouterr().err
