"""When a pipeline runs by itself."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Self
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from pydantic import Field, field_validator, model_validator

from dinov2_core.config.frozen import Frozen
from pipelines.spec.cron import Cron, in_zone, next_firings, parse


class Schedule(Frozen):
    """A recurring run on a cluster; `dinopipe run` and `submit` ignore it."""

    cron: str
    """Five fields (minute hour day month weekday), six with the seconds first, or a nickname such
    as `@weekly`."""
    time_zone: str = "UTC"
    """Time zone of `cron`, such as `Europe/Berlin`."""
    server_time_zone: str = "UTC"
    """Time zone of the cluster's scheduler (cronScheduleTimezone in pipeline-install-config)."""
    catch_up: bool = False
    """Whether times missed while the scheduler was down are made up for, one after another."""
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
    def server_cron(self) -> Cron:
        """The same schedule for the scheduler: six fields in its own time zone."""
        return in_zone(
            parse(self.cron),
            zone=ZoneInfo(self.time_zone),
            server=ZoneInfo(self.server_time_zone),
            now=datetime.now(tz=UTC),
        )

    def next_firings(self, after: datetime, *, count: int = 3) -> list[datetime]:
        """The next times of firing in the schedule's time zone, as the scheduler will see them."""
        server, zone = ZoneInfo(self.server_time_zone), ZoneInfo(self.time_zone)
        firings = next_firings(self.server_cron, zone=server, after=after, count=count)
        return [moment.astimezone(zone) for moment in firings]
