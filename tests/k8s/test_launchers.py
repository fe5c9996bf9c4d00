from __future__ import annotations

import pytest
from pydantic import ValidationError

from k8s.launchers import (
    Processes,
    PyTorchJob,
    PyTorchJobLaunch,
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
    [Processes(), TrainJob(runtime="other-v2", on_stop="suspend"), PyTorchJob(max_restarts=1)],
)
def test_a_launch_survives_the_parameter_it_travels_in(
    launcher: Processes | TrainJob | PyTorchJob,
) -> None:
    launch = launch_of(launcher, pods=FULL)
    assert read_launch(launch.model_dump_json()) == launch
    if isinstance(launch, TrainJobLaunch | PyTorchJobLaunch):
        assert launch.pods == FULL
        assert launch.model_dump(exclude={"pods"}) == launcher.model_dump()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"kind":"mpi"}', "'processes', 'trainjob', 'pytorchjob'"),
        ('{"kind":"trainjob"}', "pods"),
        ('{"kind":"processes","runtime":"r"}', "Extra inputs"),
        ('{"kind":"pytorchjob","max_restarts":-1}', "greater than or equal to 0"),
    ],
)
def test_other_launches_are_refused(text: str, reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        read_launch(text)
