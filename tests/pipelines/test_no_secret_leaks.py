"""A secret planted wherever a user may have one shows nowhere in what is rendered or written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from components.curate.main import main as curate
from pipelines.__main__ import main
from pipelines.spec.pipeline_spec import load_spec
from tests.pipelines.kfp_server import API, KfpServer, stage_details
from tests.pipelines.specs import small_values, write_spec

PLANTED = "hunter2x"
ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": f"AKIA{PLANTED}1",
    "AWS_SECRET_ACCESS_KEY": f"aws-secret-{PLANTED}2",
    "AWS_SESSION_TOKEN": f"aws-session-{PLANTED}3",
    "MLFLOW_TRACKING_USERNAME": f"mlflow-user-{PLANTED}4",
    "MLFLOW_TRACKING_PASSWORD": f"mlflow-password-{PLANTED}5",
    "MLFLOW_TRACKING_TOKEN": f"mlflow-token-{PLANTED}6",
    "HF_TOKEN": f"hf_{PLANTED}7",
}


@pytest.fixture(autouse=True)
def planted(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("KF_PIPELINES_SA_TOKEN_PATH", raising=False)


def cluster_commands(server: KfpServer, spec: str, output: Path, flags: list[str]) -> None:
    """Everything a user may do, in success and in failure."""
    failed = stage_details(("curate", "FAILED"), reason="exit code 1")
    server.first_script = [{"state": "FAILED", **failed}]
    server.logs["demo-x1-01"] = "last line\n"
    main(["compile", spec, "-o", str(output)])
    at = ["--host", server.url, *flags]
    assert main(["submit", spec, "--wait", *at]) == 1
    (run_id,) = server.runs
    for command in ("status", "logs", "wait", "cancel"):
        main([command, run_id, *at])
    for change in ([], ["--pause"], ["--resume"], ["--delete"]):
        assert main(["schedule", spec, *change, *at]) == 0
    main(["schedules", *at])


def failing_commands(server: KfpServer, flags: list[str]) -> None:
    """A server that echoes what it was sent, in each way to fail."""
    at = ["--host", server.url, *flags]
    for server.token, server.cookie in (("another-token", ""), ("", "another=cookie")):
        assert main(["schedules", *at]) == 2
    server.token = server.cookie = ""
    for status in (302, 400, 401, 403, 404, 409):
        server.fail("GET", f"{API}/recurringruns", status, headers={"Location": "/login"})
        assert main(["schedules", *at]) == 2
    assert main(["schedules", "--host", f"https://me:{PLANTED}@kubeflow.example"]) == 2


def sent(server: KfpServer) -> str:
    """Addresses and bodies, as they arrived; credentials travel in headers alone."""
    return "\n".join(
        f"{asked.method} {asked.path} {json.dumps(asked.query)} {asked.body!r}"
        for asked in server.asked
    )


@pytest.mark.parametrize("kind", ["token", "cookie", "token-file", "cookie-file"])
def test_nothing_that_goes_to_or_comes_from_a_cluster_shows_one(
    server: KfpServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    kind: str,
) -> None:
    values = small_values("s3://bucket/pile")
    values["schedule"] = {"cron": "0 3 * * 1"}
    spec = str(write_spec(values, tmp_path / "spec.yaml"))
    secret = f"session=cluster-{PLANTED}8" if "cookie" in kind else f"cluster-token-{PLANTED}8"
    flags: list[str] = []
    if kind.endswith("-file"):
        file = tmp_path / "credentials"
        file.write_text(secret)
        flags = [f"--{kind}", str(file)]
    else:
        monkeypatch.setenv(f"KF_PIPELINES_{kind.upper()}", secret)
    if "cookie" in kind:
        server.cookie = secret
    else:
        server.token = secret
    output = tmp_path / "pipeline.yaml"
    cluster_commands(server, spec, output, flags)
    failing_commands(server, flags)

    shown = capfd.readouterr()
    headers = json.dumps([asked.headers for asked in server.asked])
    assert f"{PLANTED}8" in headers, "the test itself: the secret was in use"
    everything = {
        "compiled": output.read_text(),
        "uploaded": "".join(package.decode() for package in server.packages.values()),
        "sent": sent(server),
        "output": shown.out,
        "errors": shown.err,
    }
    assert all(everything.values()), "the test itself: each of them holds something"
    assert not [name for name, text in everything.items() if PLANTED in text]


@pytest.mark.parametrize(
    "uri",
    [
        f"s3://key:{PLANTED}@bucket/pile",
        f"https://host/pile?X-Amz-Signature={PLANTED}",
    ],
)
@pytest.mark.parametrize("command", ["validate", "compile", "submit", "schedule"])
def test_a_spec_that_holds_one_is_refused_and_not_repeated(
    server: KfpServer,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    uri: str,
    command: str,
) -> None:
    spec = write_spec(small_values(uri), tmp_path / "spec.yaml")
    given = [command, str(spec)]
    given += ["-o", str(tmp_path / "p.yaml")] if command == "compile" else []
    given += ["--host", server.url] if command in ("submit", "schedule") else []
    assert main(given) == 2
    shown = capfd.readouterr()
    assert "images.uri: holds a" in shown.err
    assert PLANTED not in shown.out + shown.err
    assert server.asked == []
    assert not (tmp_path / "p.yaml").exists()


def files_with_the_secret(folder: Path) -> list[str]:
    return [
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.is_file() and PLANTED.encode() in path.read_bytes()
    ]


def test_no_file_that_a_stage_writes_shows_one(
    pile: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Manifests, shards, progress, the MLflow store with its parameters, tags and artifacts."""
    workdir = tmp_path / "work"
    spec = load_spec(write_spec(small_values(pile), tmp_path / "spec.yaml"))
    context = {"workdir": str(workdir), "run_id": "r", "run_name": "r"}
    flags = {
        "config": spec.curate_stage.model_dump_json(),
        "context": json.dumps(context),
        "output": str(tmp_path / "dataset.json"),
        "kubeflow-run": "kfp-1",
    }
    assert curate([part for name, given in flags.items() for part in (f"--{name}", given)]) == 0
    assert (workdir / "mlflow.db").exists()
    assert files_with_the_secret(tmp_path) == []
    shown = capfd.readouterr()
    assert PLANTED not in shown.out + shown.err


@pytest.mark.slow
def test_no_file_of_a_whole_run_shows_one(
    pile: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    spec = write_spec(small_values(pile), tmp_path / "spec.yaml")
    assert main(["run", str(spec), "--workdir", str(tmp_path / "work")]) == 0
    assert files_with_the_secret(tmp_path) == []
    shown = capfd.readouterr()
    assert PLANTED not in shown.out + shown.err
