from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pytest

from pipelines.spec.pipeline_spec import load_spec
from pipelines.spec.problems import SpecError
from pipelines.spec.schedule import Schedule
from tests.pipelines.specs import small_values, write_spec


def test_it_neither_catches_up_nor_overlaps_by_default() -> None:
    schedule = Schedule(cron="0 3 * * 1")
    assert (schedule.catch_up, schedule.max_concurrency) == (False, 1)


def test_firings_are_shown_in_the_schedules_time_zone() -> None:
    schedule = Schedule(cron="0 3 * * 1", time_zone="Asia/Tokyo")
    assert schedule.server_cron == "0 0 18 * * 0"
    found = schedule.next_firings(datetime(2026, 11, 23, tzinfo=UTC), count=2)
    assert [moment.isoformat() for moment in found] == [
        "2026-11-30T03:00:00+09:00",
        "2026-12-07T03:00:00+09:00",
    ]


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ({"cron": "* * * * *"}, "schedule.cron: '\\* \\* \\* \\* \\*' fires 1440 times a day"),
        ({"cron": "0 3 * * *", "time_zone": "Mars/Olympus"}, "schedule.time_zone.*no time zone"),
        ({"cron": "0 3 * * *", "time_zone": "../etc"}, "schedule.time_zone.*no time zone"),
        ({"cron": "0 3 * * *", "time_zone": "Europe/Berlin"}, "schedule: .*summer time"),
        ({"cron": "0 3 * * *", "max_concurrency": 11}, "schedule.max_concurrency"),
        ({"cron": "0 3 * * *", "timezone": "UTC"}, "schedule.timezone"),
    ],
)
def test_a_wrong_schedule_is_refused_with_its_path(
    tmp_path: Path, schedule: dict[str, object], message: str
) -> None:
    values = {**small_values("s3://bucket/pile"), "schedule": schedule}
    with pytest.raises(SpecError, match=message):
        load_spec(write_spec(values, tmp_path / "spec.yaml"))


def test_a_server_in_the_schedules_zone_needs_no_translation() -> None:
    schedule = Schedule(
        cron="0 3 * * *", time_zone="Europe/Berlin", server_time_zone="Europe/Berlin"
    )
    assert schedule.server_cron == "0 0 3 * * *"
