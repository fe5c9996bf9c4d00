"""When a pipeline runs by itself."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Self
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from pydantic import Field, field_validator, model_validator

from dinov2_core.config.frozen import Frozen
from pipelines.spec.cron import Cron, in_zone, next_firings, parse


class Schedule(Frozen):
    """A recurring run on a cluster; `dinopipe run` and `submit` take no notice of it."""

    cron: str
    """Five fields (minute hour day month weekday), six with the seconds first, or a nickname such
    as `@weekly`."""
    time_zone: str = "UTC"
    """Time zone that `cron` is meant in, such as `Europe/Berlin`."""
    server_time_zone: str = "UTC"
    """Time zone of the cluster's scheduler (cronScheduleTimezone in pipeline-install-config)."""
    catch_up: bool = False
    """Whether times missed while the scheduler was down are made up for, one after another."""
    max_concurrency: int = Field(1, ge=1, le=10)
    """Runs of this schedule at the same time."""

    @field_validator("cron")
    @classmethod
    def _is_understood(cls, cron: str) -> str:
        parse(cron)
        return cron

    @field_validator("time_zone", "server_time_zone")
    @classmethod
    def _exists(cls, name: str) -> str:
        try:
            ZoneInfo(name)
        except (ZoneInfoNotFoundError, ValueError, OSError) as error:
            raise ValueError(
                "is no time zone; write a name of the IANA database, such as UTC or Europe/Berlin"
            ) from error
        return name

    @model_validator(mode="after")
    def _can_be_sent(self) -> Self:
        _ = self.sent_cron
        return self

    @property
    def sent_cron(self) -> Cron:
        """What the scheduler is given: six fields in its own time zone."""
        return in_zone(
            parse(self.cron),
            zone=ZoneInfo(self.time_zone),
            server=ZoneInfo(self.server_time_zone),
            now=datetime.now(tz=UTC),
        )

    def next_firings(self, after: datetime, *, count: int = 3) -> list[datetime]:
        """The next times of firing in the schedule's time zone, as the scheduler will see them."""
        server, zone = ZoneInfo(self.server_time_zone), ZoneInfo(self.time_zone)
        firings = next_firings(self.sent_cron, zone=server, after=after, count=count)
        return [moment.astimezone(zone) for moment in firings]
