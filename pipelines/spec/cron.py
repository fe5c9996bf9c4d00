"""Cron expressions as Kubeflow's scheduler reads them: robfig/cron 1.2, seconds first."""

from __future__ import annotations

import calendar
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime, timedelta
from zoneinfo import ZoneInfo

FIELDS = ("second", "minute", "hour", "day of month", "month", "day of week")
BOUNDS = ((0, 59), (0, 59), (0, 23), (1, 31), (1, 12), (0, 6))
MONTHS = {name.lower(): number for number, name in enumerate(calendar.month_abbr) if name}
WEEKDAYS = {"sun": 0, "mon": 1, "tue": 2, "wed": 3, "thu": 4, "fri": 5, "sat": 6}
NICKNAMES = {
    "@yearly": "0 0 1 1 *",
    "@annually": "0 0 1 1 *",
    "@monthly": "0 0 1 * *",
    "@weekly": "0 0 * * 0",
    "@daily": "0 0 * * *",
    "@midnight": "0 0 * * *",
    "@hourly": "0 * * * *",
}
HOUR_SECONDS = 3600
DAY_SECONDS = 24 * HOUR_SECONDS
FAR_DAYS = 9 * 366
"""A leap day comes at least every eight years."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cron:
    """When to fire: the sets of values of each field."""

    fields: tuple[str, ...]
    """The six fields as text."""
    values: tuple[frozenset[int], ...]
    """The same as numbers."""

    def __str__(self) -> str:
        return " ".join(self.fields)

    @property
    def times_of_day(self) -> list[int]:
        """Seconds after midnight, ascending."""
        seconds, minutes, hours = (sorted(part) for part in self.values[:3])
        return [
            hour * HOUR_SECONDS + minute * 60 + second
            for hour in hours
            for minute in minutes
            for second in seconds
        ]

    def fires_on(self, day: date) -> bool:
        """Whether a day is one of its days.

        As everywhere in cron, with both day fields restricted either of them is enough.
        """
        _, _, _, days, months, weekdays = self.values
        if day.month not in months:
            return False
        by_day, by_weekday = day.day in days, day.isoweekday() % 7 in weekdays
        if _is_any(self.fields[3]) or _is_any(self.fields[5]):
            return by_day and by_weekday
        return by_day or by_weekday


def parse(text: str) -> Cron:
    """Read an expression of five fields, or of six with the seconds first, or a nickname.

    Raises:
        ValueError: Kubeflow would not take it, or would fire at other times than it seems to say.
    """
    written = text.strip().lower()
    if written.startswith("@"):
        if written not in NICKNAMES:
            raise ValueError(f"is no known nickname; use one of {', '.join(NICKNAMES)}")
        written = NICKNAMES[written]
    if "tz=" in written:
        raise ValueError("cannot hold a time zone, Kubeflow does not read it; set time_zone")
    fields = tuple(written.split())
    if len(fields) == 5:
        fields = ("0", *fields)
    elif len(fields) != 6:
        raise ValueError(
            f"has {len(fields)} fields; write five (minute hour day month weekday), such as "
            "'0 3 * * 1' for Mondays at 3:00, or six with the seconds first"
        )
    elif _is_any(fields[2]):
        raise ValueError(
            f"fires every hour: of six fields the first is the second and the third the hour; if "
            f"this is meant write '@hourly' or '{fields[1]} * * * *', for once a day at 3:00 "
            "'0 3 * * *'"
        )
    values = tuple(_values(field, number) for number, field in enumerate(fields))
    cron = Cron(fields=fields, values=values)
    _check_day_fields(cron)
    _check_interval(cron)
    if next(_days(cron, datetime.now(tz=UTC).date()), None) is None:
        raise ValueError("never fires: no such day exists; change day or month")
    return cron


def _is_any(field: str) -> bool:
    return field in ("*", "?", "*/1")


def _values(field: str, number: int) -> frozenset[int]:
    """The numbers that a field stands for."""
    found: set[int] = set()
    for part in field.split(","):
        found.update(_range(part, number))
    return frozenset(found)


def _range(part: str, number: int) -> range:
    name, (low, high) = FIELDS[number], BOUNDS[number]
    match = re.fullmatch(r"(?:([*?])|([0-9a-z]+)(?:-([0-9a-z]+))?)(?:/([0-9]+))?", part)
    if match is None:
        raise ValueError(
            f"has {part!r} as {name}, which Kubeflow does not know; use numbers, names, ranges "
            "(1-5), lists (1,3) and steps (*/6)"
        )
    wild, first, last, step = match.groups()
    if wild == "?" and number not in (3, 5):
        raise ValueError(f"has '?' as {name}; write *")
    start = low if wild else _number(first, number)
    end = high if wild or (step and not last) else _number(last, number) if last else start
    if start > end:
        raise ValueError(f"has {part!r} as {name}, which runs backwards; write it as a list")
    if step is not None and int(step) == 0:
        raise ValueError(f"has a step of 0 as {name}; write 1 or more")
    return range(start, end + 1, int(step or 1))


def _number(word: str, number: int) -> int:
    names = {4: MONTHS, 5: WEEKDAYS}.get(number, {})
    low, high = BOUNDS[number]
    if word in names:
        return names[word]
    if number == 5 and word == "7":
        raise ValueError("has 7 as day of week; Sunday is 0 or sun")
    if not word.isdecimal() or not low <= int(word) <= high:
        choice = f"{low} to {high}" + (f" or a name such as {next(iter(names))}" if names else "")
        raise ValueError(f"has {word!r} as {FIELDS[number]}; choose {choice}")
    return int(word)


def _check_day_fields(cron: Cron) -> None:
    day, weekday = cron.fields[3], cron.fields[5]
    if _is_any(day) or _is_any(weekday):
        return
    if day[0] in "*?" or weekday[0] in "*?":
        raise ValueError(
            f"has {day!r} as day of month beside {weekday!r} as day of week; versions of cron "
            "read that differently: write the days as a list"
        )


def _check_interval(cron: Cron) -> None:
    times = cron.times_of_day
    following = [*times[1:], times[0] + DAY_SECONDS]
    shortest = min(after - before for before, after in zip(times, following, strict=True))
    if shortest < HOUR_SECONDS:
        raise ValueError(
            f"fires {len(times)} times a day, {shortest} seconds apart, and a run takes longer; "
            "leave an hour at least: five fields are minute hour day month weekday, with six the "
            "seconds come first"
        )


def _days(cron: Cron, first: date) -> Iterator[date]:
    for number in range(FAR_DAYS):
        day = first + timedelta(days=number)
        if cron.fires_on(day):
            yield day


def next_firings(cron: Cron, *, zone: ZoneInfo, after: datetime, count: int) -> list[datetime]:
    """The next times of firing.

    Args:
        cron: Schedule.
        zone: Time zone that the schedule is read in.
        after: With a time zone; firings are later than this.
        count: How many.

    Returns:
        Times in `zone`, ascending; hours that a clock change leaves out are left out.
    """
    found: list[datetime] = []
    for day in _days(cron, after.astimezone(zone).date()):
        for seconds in cron.times_of_day:
            clock = datetime(day.year, day.month, day.day) + timedelta(seconds=seconds)
            moment = clock.replace(tzinfo=zone)
            exists = moment.astimezone(UTC).astimezone(zone).replace(tzinfo=None) == clock
            if exists and moment > after:
                found.append(moment)
            if len(found) == count:
                return found
    return found


def in_zone(cron: Cron, *, zone: ZoneInfo, server: ZoneInfo, now: datetime) -> Cron:
    """The same moments for a scheduler whose clock shows another time zone.

    Args:
        cron: Schedule as read in `zone`.
        zone: The schedule's time zone.
        server: The scheduler's; it has one for all schedules.
        now: With a time zone; the zones are compared for two years from here.

    Raises:
        ValueError: No single expression stands for the same moments.
    """
    advice = (
        "set cronScheduleTimezone in the cluster's ConfigMap pipeline-install-config, and "
        f"schedule.server_time_zone, to {zone.key}; or write the schedule in {server.key}"
    )
    shift = _distance_seconds(zone, server, now)
    if shift is None:
        raise ValueError(
            f"{zone.key} and the scheduler's {server.key} are not always as far apart (summer "
            f"time); {advice}"
        )
    if shift == 0:
        return cron
    if shift % HOUR_SECONDS and len(cron.times_of_day) > 1:
        raise ValueError(
            f"several times a day in {zone.key} are no expression in {server.key}; {advice}"
        )
    moved = [time + shift for time in cron.times_of_day]
    days = {time // DAY_SECONDS for time in moved}
    if len(days) > 1 or (days != {0} and not (_is_any(cron.fields[3]) and _is_any(cron.fields[4]))):
        raise ValueError(f"falls on other days in the scheduler's {server.key}; {advice}")
    hours = frozenset(time % DAY_SECONDS // HOUR_SECONDS for time in moved)
    minutes = frozenset(time % HOUR_SECONDS // 60 for time in moved)
    by = days.pop()
    weekdays = frozenset((day + by) % 7 for day in cron.values[5])
    texts, values = list(cron.fields), list(cron.values)
    for number, numbers in ((1, minutes), (2, hours), (5, weekdays)):
        values[number] = numbers
        if not _is_any(texts[number]):
            texts[number] = ",".join(str(value) for value in sorted(numbers))
    return replace(cron, fields=tuple(texts), values=tuple(values))


def _distance_seconds(zone: ZoneInfo, server: ZoneInfo, now: datetime) -> int | None:
    """Seconds from the schedule's clock to the scheduler's; None if they change."""
    found: set[int] = set()
    for number in range(2 * 366):
        moment = now + timedelta(days=number)
        ahead, behind = moment.astimezone(server).utcoffset(), moment.astimezone(zone).utcoffset()
        if ahead is not None and behind is not None:
            found.add(int((ahead - behind).total_seconds()))
    return found.pop() if len(found) == 1 else None
