from __future__ import annotations

from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest

from pipelines.spec.cron import Cron, in_zone, next_firings, parse

NOW = datetime(2026, 11, 23, 12, 0, tzinfo=UTC)  # a Monday
HERE = ZoneInfo("UTC")


def firings(cron: Cron, *, count: int = 3, zone: ZoneInfo = HERE) -> list[str]:
    found = next_firings(cron, zone=zone, after=NOW, count=count)
    return [f"{moment:%a %d %b %H:%M}" for moment in found]


@pytest.mark.parametrize(
    ("written", "sent"),
    [
        ("0 3 * * *", "0 0 3 * * *"),
        ("  0   3 * * 1 ", "0 0 3 * * 1"),
        ("0 0 3 * * *", "0 0 3 * * *"),
        ("30 0 3 ? * MON-FRI", "30 0 3 * * 1,2,3,4,5"),
        ("0 3 1 jan,jul *", "0 0 3 1 1,7 *"),
        ("0 */6 * * *", "0 0 0,6,12,18 * * *"),
        ("0 3 * * 7", "0 0 3 * * 0"),
        ("0 3 * * fri-mon", "0 0 3 * * 0,1,5,6"),
        ("@daily", "0 0 0 * * *"),
        ("@midnight", "0 0 0 * * *"),
        ("@weekly", "0 0 0 * * 0"),
        ("@monthly", "0 0 0 1 * *"),
        ("@yearly", "0 0 0 1 1 *"),
        ("@hourly", "0 0 * * * *"),
        ("7 * * * *", "0 7 * * * *"),
    ],
)
def test_kubeflow_gets_six_fields_of_numbers(written: str, sent: str) -> None:
    assert str(parse(written)) == sent


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("", "has 0 fields"),
        ("0 3 * *", "has 4 fields"),
        ("0 0 3 * * * 2026", "has 7 fields"),
        ("* * * * *", "fires 1440 times a day, 60 seconds apart"),
        ("*/30 * * * *", "1800 seconds apart"),
        ("* 0 3 * * *", "fires 60 times a day, 1 seconds apart"),
        (
            "0 3 * * * *",
            "fires every hour: of six fields .* write '@hourly' or '3 \\* \\* \\* \\*'",
        ),
        ("0 60 3 * * *", "is not valid .*out of range"),
        ("0 24 * * *", "out of range"),
        ("0 3 0 * *", "out of range"),
        ("0 3 * 13 *", "out of range"),
        ("0 3 * * 8", "out of range"),
        ("0 3 * * monday", "has the field 'monday', which Kubeflow does not know"),
        ("0 */0 * * *", "step '0'"),
        ("0 3 l * *", "has the field 'l'"),
        ("0 3 15w * *", "has the field '15w'"),
        ("0 3 * * 1#2", "has the field '1#2'"),
        ("H 3 * * *", "has the field 'h'"),
        ("R 3 * * *", "has the field 'r'"),
        ("? 3 * * *", "is not valid .*Question mark"),
        ("0 3,, * * *", "is not valid"),
        ("0 3 -1 * *", "is not valid"),
        ("@every 1h", "is not valid .*@hourly, @daily"),
        ("@reboot", "is not valid .*@hourly, @daily"),
        ("CRON_TZ=Europe/Berlin 0 3 * * *", "time_zone for a time zone"),
        ("0 3 31 2 *", "never fires"),
        ("0 3 */2 * 1", "versions of cron read that differently"),
        ("0 3 1 * */2", "versions of cron read that differently"),
    ],
)
def test_what_kubeflow_would_not_do_is_refused(written: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse(written)


def test_an_hour_apart_over_midnight_is_enough() -> None:
    assert firings(parse("30 23,0 * * *"), count=2) == ["Mon 23 Nov 23:30", "Tue 24 Nov 00:30"]


def test_a_leap_day_comes() -> None:
    assert firings(parse("0 3 29 2 *"), count=2) == ["Tue 29 Feb 03:00", "Sun 29 Feb 03:00"]


@pytest.mark.parametrize(
    ("written", "wanted"),
    [
        ("0 3 * * *", ["Tue 24 Nov 03:00", "Wed 25 Nov 03:00", "Thu 26 Nov 03:00"]),
        ("0 13 * * *", ["Mon 23 Nov 13:00", "Tue 24 Nov 13:00", "Wed 25 Nov 13:00"]),
        ("0 12 * * *", ["Tue 24 Nov 12:00", "Wed 25 Nov 12:00", "Thu 26 Nov 12:00"]),
        ("0 3 * * 0", ["Sun 29 Nov 03:00", "Sun 06 Dec 03:00", "Sun 13 Dec 03:00"]),
        ("0 3 * * sat,sun", ["Sat 28 Nov 03:00", "Sun 29 Nov 03:00", "Sat 05 Dec 03:00"]),
        ("0 3 1 * *", ["Tue 01 Dec 03:00", "Fri 01 Jan 03:00", "Mon 01 Feb 03:00"]),
        ("0 3 1 * mon", ["Mon 30 Nov 03:00", "Tue 01 Dec 03:00", "Mon 07 Dec 03:00"]),
        ("0 8-20/6 * * *", ["Mon 23 Nov 14:00", "Mon 23 Nov 20:00", "Tue 24 Nov 08:00"]),
        ("30 0/12 * * *", ["Mon 23 Nov 12:30", "Tue 24 Nov 00:30", "Tue 24 Nov 12:30"]),
    ],
)
def test_the_next_times(written: str, wanted: list[str]) -> None:
    assert firings(parse(written)) == wanted


def test_the_next_times_equal_those_of_looking_at_every_hour() -> None:
    cron = parse("0 1,5,17 * 11-12 1-5")
    found = next_firings(cron, zone=HERE, after=NOW, count=60)
    hours = (NOW + timedelta(hours=n) for n in range(1, 24 * 40))
    naive = [
        hour
        for hour in hours
        if hour.hour in (1, 5, 17) and hour.month >= 11 and hour.weekday() < 5
    ]
    assert found == naive[:60]


def test_an_hour_that_a_clock_change_leaves_out_is_left_out() -> None:
    zone = ZoneInfo("Europe/Berlin")
    found = next_firings(
        parse("30 2 * * *"), zone=zone, after=datetime(2027, 3, 27, tzinfo=UTC), count=3
    )
    assert [f"{moment:%d %H:%M}" for moment in found] == ["27 02:30", "29 02:30", "30 02:30"]


@pytest.mark.parametrize(
    ("written", "zone", "server"),
    [
        ("0 3 * * 1", "Asia/Tokyo", "UTC"),
        ("0 3 * * mon-fri", "Asia/Tokyo", "UTC"),
        ("0 3 * * *", "Asia/Kolkata", "UTC"),
        ("0 10,11 * * *", "Asia/Tokyo", "UTC"),
        ("0 22 * * 6", "UTC", "Asia/Tokyo"),
        ("0 12 1 2 *", "Asia/Tokyo", "UTC"),
        ("0 3 1 * *", "Europe/Berlin", "Europe/Paris"),
    ],
)
def test_in_another_zone_it_fires_at_the_same_moments(written: str, zone: str, server: str) -> None:
    cron, here, there = parse(written), ZoneInfo(zone), ZoneInfo(server)
    moved = in_zone(cron, zone=here, server=there, now=NOW)
    wanted = next_firings(cron, zone=here, after=NOW, count=20)
    assert next_firings(moved, zone=there, after=NOW, count=20) == wanted
    assert parse(str(moved)) == moved


@pytest.mark.parametrize(
    ("written", "zone", "message"),
    [
        ("0 3 * * 1", "Europe/Berlin", "summer time.*cronScheduleTimezone.*Europe/Berlin"),
        ("0 3 1 * *", "Asia/Tokyo", "falls on other days"),
        ("0 3,15 * * *", "Asia/Tokyo", "falls on other days"),
        ("0 3 * 1 *", "Asia/Tokyo", "falls on other days"),
        ("0 3,15 * * *", "Asia/Kolkata", "several times a day"),
    ],
)
def test_what_no_expression_can_say_is_refused(written: str, zone: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        in_zone(parse(written), zone=ZoneInfo(zone), server=HERE, now=NOW)
