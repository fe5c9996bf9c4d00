"""The schedule of recurring runs on a cluster."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Self
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from pydantic import Field, field_validator, model_validator

from dinov2_core.config.frozen import Frozen
from pipelines.spec.cron import in_zone, next_firings, parse


class Schedule(Frozen):
    """A recurring run on a cluster; without effect on `dinopipe run` and `submit`."""

    cron: str
    """Five fields (minute hour day month weekday), six with the seconds first, or a nickname such
    as `@weekly`."""
    time_zone: str = "UTC"
    """Time zone that `cron` is meant in, such as `Europe/Berlin`."""
    server_time_zone: str = "UTC"
    """Time zone of the cluster's scheduler (cronScheduleTimezone in pipeline-install-config)."""
    catch_up: bool = False
    """Whether runs missed while the scheduler was down are started later, one after another."""
    max_concurrency: int = Field(1, ge=1, le=10)
    """Runs of this schedule at the same time."""

    @field_validator("cron")
    @classmethod
    def _is_valid(cls, cron: str) -> str:
        parse(cron)
        return cron

    @field_validator("time_zone", "server_time_zone")
    @classmethod
    def _is_known_zone(cls, name: str) -> str:
        try:
            ZoneInfo(name)
        except (ZoneInfoNotFoundError, ValueError, OSError) as error:
            raise ValueError(
                "is no time zone; write a name of the IANA database, such as UTC or Europe/Berlin"
            ) from error
        return name

    @model_validator(mode="after")
    def _has_server_cron(self) -> Self:
        _ = self.server_cron
        return self

    @property
    def server_cron(self) -> str:
        """What the scheduler gets: six fields in its own time zone."""
        zone, server = ZoneInfo(self.time_zone), ZoneInfo(self.server_time_zone)
        return str(in_zone(parse(self.cron), zone=zone, server=server, now=datetime.now(tz=UTC)))

    def next_firings(self, after: datetime, *, count: int = 3) -> list[datetime]:
        """The next times of firing in the schedule's time zone, by the scheduler's expression."""
        server, zone = ZoneInfo(self.server_time_zone), ZoneInfo(self.time_zone)
        firings = next_firings(parse(self.server_cron), zone=server, after=after, count=count)
        return [moment.astimezone(zone) for moment in firings]
