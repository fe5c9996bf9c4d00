"""Cron expressions: what users write, as the six fields that Kubeflow's scheduler takes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from itertools import product
from zoneinfo import ZoneInfo

from croniter import CroniterBadDateError, CroniterError, croniter

SYNTAX = re.compile(
    r"(?:[0-9*?,/-]|jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec|sun|mon|tue|wed|thu|fri|sat)+"
)
"""Of a field: numbers, names, ranges, lists and steps; croniter also takes L, W, # and random ones,
which Kubeflow does not know."""
UNITS = (range(60), range(60), range(24))
"""Seconds, minutes, hours."""
HOUR_SECONDS = 3600
DAY_SECONDS = 24 * HOUR_SECONDS


@dataclass(frozen=True, slots=True, kw_only=True)
class Cron:
    """Values of second, minute, hour, day of month, month and day of week; None is `*`."""

    values: tuple[tuple[int, ...] | None, ...]

    def __str__(self) -> str:
        """Six fields, seconds first (robfig/cron 1.2); numbers and lists only."""
        return " ".join("*" if part is None else ",".join(map(str, part)) for part in self.values)

    @property
    def times_of_day(self) -> list[int]:
        """Seconds after midnight, ascending."""
        parts = zip(self.values, UNITS, strict=False)
        seconds, minutes, hours = (unit if part is None else part for part, unit in parts)
        return sorted(
            hour * HOUR_SECONDS + minute * 60 + second
            for hour, minute, second in product(hours, minutes, seconds)
        )


def parse(text: str) -> Cron:
    """Read an expression of five fields, or of six with the seconds first, or a nickname.

    Raises:
        ValueError: It is not valid, or would fire at other times than it seems to say.
    """
    fields = text.lower().split()
    if not text.strip().startswith("@"):
        _check_fields(fields)
    try:
        expanded, _ = croniter.expand(" ".join(fields), second_at_beginning=True)
    except CroniterError as error:
        raise ValueError(
            f"is not valid ({error}); write five fields, six with the seconds first, or one of "
            "@hourly, @daily, @weekly, @monthly, @yearly"
        ) from error
    second = expanded[5] if len(expanded) == 6 else [0]
    parts = (second, *expanded[:5])
    cron = Cron(values=tuple(None if "*" in part else tuple(map(int, part)) for part in parts))
    _check_at_most_hourly(cron)
    try:
        croniter(str(cron), datetime.now(tz=UTC), second_at_beginning=True).get_next()
    except CroniterBadDateError as error:
        raise ValueError("never fires: no such day exists; change day or month") from error
    return cron


def _check_fields(fields: Sequence[str]) -> None:
    if len(fields) not in (5, 6):
        raise ValueError(
            f"has {len(fields)} fields; write five (minute hour day month weekday), such as "
            "'0 3 * * 1' for Mondays at 3:00, or six with the seconds first"
        )
    for field in fields:
        if not SYNTAX.fullmatch(field):
            raise ValueError(
                f"has the field {field!r}, which Kubeflow does not know; use numbers, names (mon, "
                "jan), ranges (1-5), lists (1,3) and steps (*/6), and time_zone for a time zone"
            )
    if len(fields) == 6 and fields[2] in ("*", "*/1"):
        raise ValueError(
            f"fires every hour: of six fields the first is the second and the third the hour; if "
            f"this is meant write '@hourly' or '{fields[1]} * * * *', for once a day at 3:00 "
            "'0 3 * * *'"
        )
    day, weekday = fields[-3], fields[-1]
    if "*/" in day + weekday and not {day, weekday} & {"*", "?"}:
        raise ValueError(
            f"has {day!r} as day of month beside {weekday!r} as day of week; versions of cron "
            "read that differently: write the days as a list"
        )


def _check_at_most_hourly(cron: Cron) -> None:
    times = cron.times_of_day
    following = [*times[1:], times[0] + DAY_SECONDS]
    shortest = min(after - before for before, after in zip(times, following, strict=True))
    if shortest < HOUR_SECONDS:
        raise ValueError(
            f"fires {len(times)} times a day, {shortest} seconds apart, and a run takes longer; "
            "leave an hour at least: five fields are minute hour day month weekday, with six the "
            "seconds come first"
        )


def next_firings(cron: Cron, *, zone: ZoneInfo, after: datetime, count: int) -> list[datetime]:
    """The next times of firing.

    Args:
        cron: Schedule.
        zone: Time zone that the schedule is read in.
        after: With a time zone; firings are later than this.
        count: How many.

    Returns:
        Times in `zone`, ascending, without those that a clock change skips.
    """
    moments = croniter(str(cron), after.astimezone(zone), datetime, second_at_beginning=True)
    times, found = set(cron.times_of_day), list[datetime]()
    while len(found) < count:
        moment: datetime = moments.get_next()
        if moment.hour * HOUR_SECONDS + moment.minute * 60 + moment.second in times:
            found.append(moment)
    return found


def in_zone(cron: Cron, *, zone: ZoneInfo, server: ZoneInfo, now: datetime) -> Cron:
    """The same times for a scheduler in another time zone.

    Args:
        cron: Schedule as read in `zone`.
        zone: The schedule's time zone.
        server: The scheduler's; it has one for all schedules.
        now: With a time zone; both zones must keep their distance for two years from here.

    Raises:
        ValueError: No single expression stands for the same times.
    """
    advice = (
        "set cronScheduleTimezone in the cluster's ConfigMap pipeline-install-config, and "
        f"schedule.server_time_zone, to {zone.key}; or write the schedule in {server.key}"
    )
    shifts = {_offset(now, server, day) - _offset(now, zone, day) for day in range(2 * 366)}
    if len(shifts) > 1:
        raise ValueError(
            f"{zone.key} and the scheduler's {server.key} are not always as far apart (summer "
            f"time); {advice}"
        )
    shift = shifts.pop()
    if shift == 0:
        return cron
    if shift % HOUR_SECONDS and len(cron.times_of_day) > 1:
        raise ValueError(
            f"several times a day in {zone.key} are no expression in {server.key}; {advice}"
        )
    times = [time + shift for time in cron.times_of_day]
    days = {time // DAY_SECONDS for time in times}
    second, _, _, day, month, weekday = cron.values
    if len(days) > 1 or (days != {0} and (day, month) != (None, None)):
        raise ValueError(f"falls on other days in the scheduler's {server.key}; {advice}")
    if weekday is not None:
        weekday = tuple(sorted((number + min(days)) % 7 for number in weekday))
    minutes = tuple(sorted({time % HOUR_SECONDS // 60 for time in times}))
    hours = tuple(sorted({time % DAY_SECONDS // HOUR_SECONDS for time in times}))
    return replace(cron, values=(second, minutes, hours, day, month, weekday))


def _offset(now: datetime, zone: ZoneInfo, days: int) -> int:
    """Seconds of a zone before UTC, some days from now."""
    offset = (now + timedelta(days=days)).astimezone(zone).utcoffset()
    return int(offset.total_seconds()) if offset else 0
