"""lease: one run at a time works in a place of a store."""

from __future__ import annotations

import json
import time

import pytest

from components.runtime.lease import leased
from components.runtime.storage import exists, read_text, write_text

URI = "s3://pile/stages/curate/0/lease.json"


def test_another_run_is_refused_until_the_holder_ends(s3: str) -> None:
    with leased(URI, owner="run a"):
        with (
            pytest.raises(ValueError, match=r"curate/0 is in use by run a; wait .* for 1\d\d s"),
            leased(URI, owner="run b"),
        ):
            pass
        assert json.loads(read_text(URI) or "")["owner"] == "run a"
    with leased(URI, owner="run b"):
        pass
    assert not exists(URI)


def test_a_restart_takes_its_own_lease_over(s3: str) -> None:
    write_text(URI, json.dumps({"owner": "run a", "until": time.time() + 100}))
    with leased(URI, owner="run a"):
        pass


@pytest.mark.parametrize(
    "left", [json.dumps({"owner": "run dead", "until": time.time() - 1}), "not a lease"]
)
def test_a_dead_run_holds_nothing(s3: str, left: str) -> None:
    write_text(URI, left)
    with leased(URI, owner="run a"):
        assert json.loads(read_text(URI) or "")["owner"] == "run a"


def test_a_lease_is_renewed_while_it_is_held(s3: str) -> None:
    with leased(URI, owner="run a", seconds=0.4):
        time.sleep(1)
        with pytest.raises(ValueError, match="in use by run a"), leased(URI, owner="run b"):
            pass


def test_a_lease_that_was_taken_is_told_and_not_removed(
    s3: str, caplog: pytest.LogCaptureFixture
) -> None:
    with leased(URI, owner="run a", seconds=0.4):
        write_text(URI, json.dumps({"owner": "run b", "until": time.time() + 100}))
        time.sleep(0.5)
    assert "another run has taken" in caplog.text
    assert json.loads(read_text(URI) or "")["owner"] == "run b"
