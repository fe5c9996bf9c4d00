from __future__ import annotations

import pytest
from pydantic import ValidationError

from k8s.launchers import (
    Processes,
    TrainJob,
    TrainJobLaunch,
    launch_of,
    read_launch,
)
from tests.golden.manifests import FULL


def test_processes_need_no_more_than_their_name() -> None:
    assert read_launch('{"kind":"processes"}') == Processes()


@pytest.mark.parametrize(
    "launcher",
    [Processes(), TrainJob(runtime="other-v2", on_stop="suspend")],
)
def test_a_launch_survives_the_parameter_it_travels_in(
    launcher: Processes | TrainJob,
) -> None:
    launch = launch_of(launcher, pods=FULL)
    assert read_launch(launch.model_dump_json()) == launch
    if isinstance(launch, TrainJobLaunch):
        assert launch.pods == FULL
        assert launch.model_dump(exclude={"pods"}) == launcher.model_dump()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"kind":"mpi"}', "'processes', 'trainjob'"),
        ('{"kind":"trainjob"}', "pods"),
        ('{"kind":"processes","runtime":"r"}', "Extra inputs"),
    ],
)
def test_other_launches_are_refused(text: str, reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        read_launch(text)
