from __future__ import annotations

import socket
import time
from pathlib import Path

import kfp
import pytest

from dinov2_core.errors import PipelinesRefused, PipelinesUnavailable, SettingsError
from pipelines.cluster.client import (
    Credentials,
    NoAnswer,
    RetryPolicy,
    connect,
    fetch_text,
    find_credentials,
    with_retries,
)
from tests.pipelines.kfp_server import API, KfpServer

QUICK = RetryPolicy(timeout_seconds=5.0, max_retries=2, backoff_seconds=0.01)


def test_a_missing_host_is_refused_before_anything_is_sent() -> None:
    with pytest.raises(SettingsError, match="no server to talk to; give --host"):
        connect("")


def test_connecting_sends_nothing(server: KfpServer) -> None:
    connect(server.url)
    connect(server.url, namespace="team")
    assert server.asked == []


@pytest.mark.parametrize(
    ("host", "message"),
    [
        ("https://me:hunter22@kubeflow.example", "holds a password"),
        ("ftp://kubeflow.example", "is no address"),
        ("https://", "is no address"),
    ],
)
def test_a_wrong_host_is_refused_without_showing_its_password(host: str, message: str) -> None:
    with pytest.raises(SettingsError, match=message) as caught:
        connect(host)
    assert "hunter22" not in str(caught.value)


def test_a_missing_ca_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="--ca-file .* is missing"):
        connect("https://kubeflow.example", ca_file=tmp_path / "none.pem")


def test_a_bearer_token_is_sent(server: KfpServer) -> None:
    server.token = "token-of-me"
    client = connect(server.url, credentials=Credentials(token="token-of-me"), retry_policy=QUICK)
    assert client.list_pipelines().total_size == 0


def test_a_token_file_is_read_anew_because_tokens_are_rotated(
    server: KfpServer, tmp_path: Path
) -> None:
    file = tmp_path / "token"
    file.write_text("first-token\n")
    client = connect(server.url, credentials=Credentials(token_file=file), retry_policy=QUICK)
    for token in ("first-token", "second-token"):
        file.write_text(token + "\n")
        server.token = token
        client.list_pipelines()


def test_a_cookie_is_sent(server: KfpServer) -> None:
    server.cookie = "authservice_session=abcdefgh"
    client = connect(server.url, credentials=Credentials(cookie=server.cookie), retry_policy=QUICK)
    client.list_pipelines()


def test_credentials_do_not_show_themselves() -> None:
    assert "geheim" not in repr(Credentials(token="geheim-1", cookie="geheim-2"))


class TestFindingCredentials:
    def test_a_file_goes_before_the_environment(self, tmp_path: Path) -> None:
        file = tmp_path / "token"
        file.write_text("from-file")
        found = find_credentials(
            token_file=file, cookie_file=None, environment={"KF_PIPELINES_TOKEN": "from-env"}
        )
        assert found == Credentials(token_file=file)

    def test_the_environment_is_read(self) -> None:
        for name, wanted in (
            ("KF_PIPELINES_TOKEN", Credentials(token="x")),
            ("KF_PIPELINES_COOKIE", Credentials(cookie="x")),
        ):
            environment = {name: "x\n"}
            assert (
                find_credentials(token_file=None, cookie_file=None, environment=environment)
                == wanted
            )

    def test_a_pods_projected_token_is_found(self, tmp_path: Path) -> None:
        file = tmp_path / "projected"
        file.write_text("t")
        environment = {"KF_PIPELINES_SA_TOKEN_PATH": str(file)}
        found = find_credentials(token_file=None, cookie_file=None, environment=environment)
        assert found == Credentials(token_file=file)

    def test_nothing_is_no_credentials(self, tmp_path: Path) -> None:
        environment = {"KF_PIPELINES_SA_TOKEN_PATH": str(tmp_path / "none")}
        found = find_credentials(token_file=None, cookie_file=None, environment=environment)
        assert found == Credentials()

    def test_two_kinds_are_refused(self, tmp_path: Path) -> None:
        file = tmp_path / "secret"
        file.write_text("s")
        with pytest.raises(SettingsError, match="given twice, by --token-file and --cookie-file"):
            find_credentials(token_file=file, cookie_file=file, environment={})
        with pytest.raises(SettingsError, match="given twice, by KF_PIPELINES_TOKEN and"):
            find_credentials(
                token_file=None,
                cookie_file=None,
                environment={"KF_PIPELINES_TOKEN": "a", "KF_PIPELINES_COOKIE": "b"},
            )

    @pytest.mark.parametrize("content", [None, " \n"])
    def test_a_missing_or_empty_file_is_refused(self, tmp_path: Path, content: str | None) -> None:
        file = tmp_path / "token"
        if content is not None:
            file.write_text(content)
        with pytest.raises(SettingsError, match="cannot be read|is empty"):
            find_credentials(token_file=file, cookie_file=None, environment={})


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (302, "does not accept the credentials"),
        (400, r"refuses the request \(HTTP 400: its message\)"),
        (401, "does not accept the credentials .*--token-file"),
        (403, "does not allow this .*--namespace"),
        (404, "does not know it"),
        (409, "has it already"),
        (429, "is asked too often"),
        (500, r"fails \(HTTP 500: its message\)"),
        (503, "fails"),
    ],
)
def test_each_error_says_what_to_do(server: KfpServer, status: int, message: str) -> None:
    headers = {"Location": f"{server.url}/login"} if status == 302 else {}
    server.fail("GET", f"{API}/pipelines", status, times=9, message="its message", headers=headers)
    is_transient = status == 429 or status >= 500
    expected = PipelinesUnavailable if is_transient else PipelinesRefused
    with pytest.raises(expected, match=message) as caught:
        connect(server.url, retry_policy=QUICK).list_pipelines()
    assert getattr(caught.value, "status", status) == status


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
def test_a_read_is_repeated_until_the_server_recovers(server: KfpServer, status: int) -> None:
    server.fail("GET", f"{API}/pipelines", status, times=2)
    assert connect(server.url, retry_policy=QUICK).list_pipelines().total_size == 0
    assert server.count("GET", f"{API}/pipelines") == 3


def test_what_makes_something_new_is_repeated_only_if_it_was_turned_away(
    server: KfpServer,
) -> None:
    client = connect(server.url, retry_policy=QUICK)
    server.fail("POST", f"{API}/experiments", 429)
    assert client.create_experiment("first").display_name == "first"
    server.fail("POST", f"{API}/experiments", 500, is_done=True)
    with pytest.raises(PipelinesUnavailable, match="may have been carried out all the same"):
        client.create_experiment("second")
    names = [item["display_name"] for item in server.experiments.values()]
    assert names == ["first", "second"]


def test_the_server_says_how_long_to_wait(server: KfpServer) -> None:
    server.fail("GET", f"{API}/pipelines", 429, headers={"Retry-After": "1"})
    began = time.monotonic()
    connect(server.url, retry_policy=QUICK).list_pipelines()
    assert time.monotonic() - began >= 1.0


def test_a_slow_answer_is_given_up(server: KfpServer) -> None:
    server.fail("GET", f"{API}/pipelines", 500, times=9, seconds=2.0)
    policy = RetryPolicy(timeout_seconds=0.2, max_retries=1, backoff_seconds=0.01)
    began = time.monotonic()
    with pytest.raises(NoAnswer, match=r"does not answer \(ReadTimeoutError\)"):
        connect(server.url, retry_policy=policy).list_pipelines()
    assert time.monotonic() - began < 1.9


def test_a_refused_connection_is_no_answer() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    with pytest.raises(NoAnswer, match=r"does not answer \(NewConnectionError\); check --host"):
        connect(f"http://127.0.0.1:{port}", retry_policy=QUICK).list_pipelines()


def test_a_connection_that_is_not_trusted_is_refused_at_once(server: KfpServer) -> None:
    address = server.url.replace("http://", "https://")
    slow = RetryPolicy(timeout_seconds=5.0, max_retries=4, backoff_seconds=60.0)
    with pytest.raises(PipelinesRefused, match=r"not trusted .*name its authority with --ca-file"):
        connect(address, retry_policy=slow).list_pipelines()


def test_a_web_page_is_no_answer(server: KfpServer) -> None:
    server.fail("GET", f"{API}/pipelines", 200, headers={"Content-Type": "text/html"})
    with pytest.raises(PipelinesRefused, match="answers with a web page"):
        connect(server.url, retry_policy=QUICK).list_pipelines()


def test_an_echoed_credential_is_blacked_out(server: KfpServer) -> None:
    server.token, server.cookie = "the-right-one", ""
    client = connect(
        server.url, credentials=Credentials(token="my-wrong-token"), retry_policy=QUICK
    )
    with pytest.raises(PipelinesRefused, match=r"Unauthenticated: \*\*\*") as caught:
        client.list_pipelines()
    assert "my-wrong-token" not in str(caught.value)


def test_an_upload_is_repeated_with_its_content(server: KfpServer, tmp_path: Path) -> None:
    server.pipelines["p"] = {"pipeline_id": "p", "display_name": "p"}
    server.fail("POST", f"{API}/pipelines/upload_version", 429)
    package = tmp_path / "pipeline.yaml"
    package.write_text("schemaVersion: 2.1.0\n")
    client = connect(server.url, retry_policy=QUICK)
    made = client.upload_pipeline_version(str(package), "v", pipeline_id="p")
    assert server.packages[made.pipeline_version_id] == package.read_bytes()


def test_a_plain_client_gets_retries_once(server: KfpServer) -> None:
    client = kfp.Client(host=server.url, namespace="team")
    with_retries(client, QUICK)
    requests = client._run_api.api_client.rest_client
    assert with_retries(client)._run_api.api_client.rest_client is requests
    server.fail("GET", f"{API}/pipelines", 503)
    client.list_pipelines(namespace="team")


def test_text_comes_with_the_same_credentials(server: KfpServer) -> None:
    server.token, server.logs["pod-1"] = "t-o-k-e-n", "häuser\n"
    client = connect(server.url, credentials=Credentials(token="t-o-k-e-n"), retry_policy=QUICK)
    path = "/apis/v1alpha1/runs/r/nodes/pod-1/log"
    assert fetch_text(client, path, {"a": "b c"}) == "häuser\n"
    assert server.asked[-1].query == {"a": "b c"}


def test_text_is_asked_for_once(server: KfpServer) -> None:
    client = connect(server.url, retry_policy=QUICK)
    path = "/apis/v1alpha1/runs/r/nodes/absent/log"
    with pytest.raises(PipelinesUnavailable, match="HTTP 500"):
        fetch_text(client, path, {})
    assert server.count("GET", path) == 1
    server.fail("GET", f"{API}/pipelines", 500)
    assert client.list_pipelines().total_size == 0
