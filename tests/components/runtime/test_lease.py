"""lease: one run at a time works in a directory of a store, and one that lost it stops."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from components.runtime.lease import leased
from components.runtime.storage import exists, read_text, upload, write_text
from components.runtime.uris import local_path
from dinov2_core.errors import InputError, LeaseLost
from tests.s3_server import BadLine

HOME = "s3://pile/stages/curate/0"
URI = f"{HOME}/lease.json"


def content() -> dict[str, object]:
    found: dict[str, object] = json.loads(read_text(URI) or "{}")
    return found


def take_over(owner: str = "run b", *, seconds: float = 100) -> None:
    """What another machine does to a lease that has ended."""
    lease = {"owner": owner, "holder": "other", "until": time.time() + seconds}
    write_text(URI, json.dumps(lease))


def another_machine(patch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    patch.setenv("DINOPIPE_CACHE", str(tmp_path / "another machine's cache"))


def test_another_run_is_refused_until_the_holder_ends(
    s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with leased(URI, owner="run a"):
        with monkeypatch.context() as patch:
            another_machine(patch, tmp_path)
            with (
                pytest.raises(InputError, match=r"curate/0 is in use by run a; .* for 1\d\d s"),
                leased(URI, owner="run b"),
            ):
                pass
        assert content()["owner"] == "run a"
    with leased(URI, owner="run b"):
        pass
    assert not exists(URI)


def test_two_machines_of_one_name_do_not_share_a_lease(
    s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with leased(URI, owner="machine node"):
        another_machine(monkeypatch, tmp_path)
        refused = pytest.raises(InputError, match="in use by machine node")
        with refused, leased(URI, owner="machine node"):
            pass


def test_two_processes_of_one_machine_do_not_share_a_lease(s3: str) -> None:
    refused = pytest.raises(InputError, match="in use by another process of this machine")
    with leased(URI, owner="run a"), refused, leased(URI, owner="run a"):
        pass


HOLD = """
import sys, time
from components.runtime.lease import leased
with leased(sys.argv[1], owner="run a", seconds=float(sys.argv[2])):
    print("held", flush=True)
    time.sleep(60)
"""


def killed_holder(*, seconds: float) -> None:
    command = [sys.executable, "-c", HOLD, URI, str(seconds)]
    holder = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    holder.kill()
    holder.wait()


def test_a_restart_on_the_same_machine_takes_its_lease_again_at_once(s3: str) -> None:
    killed_holder(seconds=100)
    started = time.monotonic()
    with leased(URI, owner="run a"):
        assert time.monotonic() - started < 10


def test_a_restart_on_another_machine_waits_for_the_killed_attempt_s_lease_to_end(
    s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    take_over("run a", seconds=1)
    with leased(URI, owner="run a", waits_for_owner=True):
        assert content()["holder"] != "other"


def test_a_restart_does_not_wait_for_an_attempt_that_is_alive(
    s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with leased(URI, owner="run a", seconds=1):
        another_machine(monkeypatch, tmp_path)
        refused = pytest.raises(InputError, match="in use by run a")
        with refused, leased(URI, owner="run a", seconds=1, waits_for_owner=True):
            pass


@pytest.mark.parametrize(
    "left",
    [json.dumps({"owner": "run dead", "until": time.time() - 1}), "not a lease", "[1]"],
    ids=["expired", "no JSON", "no object"],
)
def test_a_dead_run_holds_nothing(s3: str, left: str) -> None:
    write_text(URI, left)
    with leased(URI, owner="run a"):
        assert content()["owner"] == "run a"


def test_a_lease_is_renewed_while_it_is_held(s3: str) -> None:
    with leased(URI, owner="run a", seconds=0.4):
        first = content()["until"]
        time.sleep(1)
        assert float(str(content()["until"])) > float(str(first)) + 0.4


def puts_lease(method: str, path: str) -> bool:
    return method == "PUT" and path.endswith("lease.json")


def test_a_write_whose_answer_was_lost_is_recognised_as_one_s_own(
    s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store has the lease, the client repeats the conditional write and reads 412."""
    line = BadLine(s3, faults=["lose"], concerns=puts_lease)
    with line.open(monkeypatch), leased(URI, owner="run a") as lease:
        assert not line.faults
        for _ in range(2):
            line.faults = ["lose"]
            lease.confirm()
            assert not line.faults
        write_text(f"{HOME}/manifest.json", "written")
    assert not exists(URI)


def test_renewals_whose_answers_are_lost_do_not_stop_the_work(
    s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = BadLine(s3, faults=[], concerns=puts_lease)
    with line.open(monkeypatch), leased(URI, owner="run a", seconds=0.4):
        line.faults = ["lose"] * 3
        deadline = time.monotonic() + 20
        while line.faults:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        time.sleep(0.3)
        write_text(f"{HOME}/manifest.json", "written")
    assert read_text(f"{HOME}/manifest.json") == "written"


def test_a_take_over_stops_the_work_and_everything_that_it_would_write(s3: str) -> None:
    path = local_path(f"{HOME}/file")
    path.parent.mkdir(parents=True)
    started = time.monotonic()
    lost = pytest.raises(LeaseLost, match=r"curate/0 was taken over by run b; this run stops")
    with lost, leased(URI, owner="run a", seconds=0.4):
        path.write_text("1")
        take_over()
        time.sleep(30)
    assert time.monotonic() - started < 10
    for write in (
        lambda: write_text(f"{HOME}/manifest.json", "{}"),
        lambda: upload(path, f"{HOME}/file"),
    ):
        with pytest.raises(LeaseLost):
            write()
    assert content()["owner"] == "run b"


def test_a_take_over_between_two_renewals_is_noticed_before_the_end_is_written(s3: str) -> None:
    with pytest.raises(LeaseLost, match="run b"), leased(URI, owner="run a") as lease:
        take_over()
        lease.confirm()


def test_an_interrupt_that_a_library_swallows_is_repeated(s3: str) -> None:
    swallowed = []
    with pytest.raises(LeaseLost), leased(URI, owner="run a", seconds=0.4):
        take_over()
        try:
            time.sleep(30)
        except LeaseLost as error:
            swallowed.append(error)
        time.sleep(30)
    assert swallowed


def test_threads_of_the_work_cannot_write_any_more(s3: str) -> None:
    errors: list[BaseException] = []

    def write_now_and_then() -> None:
        try:
            for number in range(300):
                write_text(f"{HOME}/block_{number}", "x")
                time.sleep(0.02)
        except LeaseLost as error:
            errors.append(error)

    thread = threading.Thread(target=write_now_and_then)
    with pytest.raises(LeaseLost), leased(URI, owner="run a", seconds=0.4):
        thread.start()
        take_over()
        time.sleep(30)
    thread.join(timeout=10)
    assert errors


def test_a_store_that_is_away_for_a_while_takes_no_lease_away(
    s3: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    line = BadLine(s3, faults=[], concerns=puts_lease)
    with line.open(monkeypatch), leased(URI, owner="run a", seconds=2):
        line.faults = ["answer 503"] * 5
        time.sleep(1)
    assert not exists(URI)


def test_signals_of_others_mean_nothing(s3: str) -> None:
    before = signal.getsignal(signal.SIGUSR2)
    with leased(URI, owner="run a"):
        os.kill(os.getpid(), signal.SIGUSR2)
        time.sleep(0.05)
    assert signal.getsignal(signal.SIGUSR2) == before
