"""The one recurring run of a spec: create, replace, pause, resume, delete."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import kfp

from components.runtime.manifests import digest_of
from dinov2_core.errors import InputError, PipelinesRefused, SettingsError
from pipelines.cluster.client import with_retries
from pipelines.cluster.submit import (
    PAGE,
    Target,
    check_fits_cluster,
    cluster_context,
    display_name_filter,
    experiment_id,
    publish,
)
from pipelines.spec.pipeline_spec import PipelineSpec
from pipelines.spec.schedule import Schedule

DESCRIPTION_PREFIX = "dinopipe schedule "
"""Of every recurring run made by this project; its digest and its schedule follow."""
ENABLED = "ENABLED"
NOT_FOUND = 404

Change = Literal["created", "unchanged", "replaced"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RecurringRun:
    """A recurring run on the server."""

    recurring_run_id: str
    name: str
    cron: str
    """Six fields, in the time zone of the scheduler."""
    is_enabled: bool
    description: str

    @property
    def digest(self) -> str:
        """Of its arguments."""
        return self.description.removeprefix(DESCRIPTION_PREFIX).partition(": ")[0]

    @property
    def schedule(self) -> str:
        """Cron expression and time zone as its spec has them, else the server's six fields."""
        return self.description.partition(": ")[2] or self.cron


def schedule_name(spec: PipelineSpec) -> str:
    """Name of a spec's recurring run."""
    return f"dinopipe-{spec.name}"


def apply(client: kfp.Client, spec: PipelineSpec, target: Target) -> tuple[RecurringRun, Change]:
    """Leave exactly one recurring run for a spec; one that was paused stays paused.

    Args:
        client: Any client.
        spec: Checked spec with a schedule.
        target: Work directory, volume and account of its runs.

    Raises:
        SettingsError: The spec has no schedule.
        SpecError: The spec names paths that pods cannot see.
        PipelinesRefused: The server refuses it.
        PipelinesUnavailable: The server fails or does not answer; calling this again continues.
    """
    schedule = _schedule_of(spec)
    with_retries(client)
    check_fits_cluster(client, spec, target)
    wanted = _arguments(client, spec, schedule, target)
    digest = digest_of(wanted)
    text = f"'{schedule.cron}' {schedule.time_zone}"
    wanted["description"] = f"{DESCRIPTION_PREFIX}{digest}: {text}"
    found = recurring_runs(client, schedule_name(spec))
    equal = [item for item in found if item.digest == digest]
    if not found:
        return _create(client, wanted, is_enabled=True), "created"
    if len(found) == 1 and equal:
        return found[0], "unchanged"
    # The new one stays disabled until the others are deleted, so that no two ever fire.
    was_enabled = any(item.is_enabled for item in found)
    new = equal[0] if equal else _create(client, wanted, is_enabled=False)
    for item in found:
        if item.recurring_run_id != new.recurring_run_id:
            _delete(client, item)
    if was_enabled and not new.is_enabled:
        client.enable_recurring_run(new.recurring_run_id)
    return _one(client, new.recurring_run_id), "replaced"


def pause(client: kfp.Client, spec: PipelineSpec) -> RecurringRun:
    """Stop firing until `resume`.

    Raises:
        InputError: The spec has no recurring run on the server.
        PipelinesRefused, PipelinesUnavailable: As for `apply`.
    """
    for item in _existing(client, spec):
        if item.is_enabled:
            client.disable_recurring_run(item.recurring_run_id)
    return _existing(client, spec)[0]


def resume(client: kfp.Client, spec: PipelineSpec) -> RecurringRun:
    """Fire again, from the next time on.

    A recurring run that is merely enabled again fires at once for the time it last missed, even
    without catch-up; so it is replaced by a new one, which has missed nothing.

    Raises:
        InputError: The spec has no recurring run on the server.
        PipelinesRefused, PipelinesUnavailable: As for `apply`.
    """
    found = _existing(client, spec)
    live = next((item for item in found if item.is_enabled), None)
    if live is None:
        old = client.get_recurring_run(found[0].recurring_run_id)
        live = _create(client, _arguments_of(old), is_enabled=True)
    for item in found:
        if item.recurring_run_id != live.recurring_run_id:
            _delete(client, item)
    return live


def delete(client: kfp.Client, spec: PipelineSpec) -> None:
    """Delete the recurring runs of a spec.

    Raises:
        InputError: The spec has no recurring run on the server.
        PipelinesRefused, PipelinesUnavailable: As for `apply`.
    """
    for item in _existing(client, spec):
        _delete(client, item)


def recurring_runs(client: kfp.Client, name: str = "") -> list[RecurringRun]:
    """Recurring runs made by this project, newest first; of one spec if its name is given.

    Raises:
        PipelinesRefused, PipelinesUnavailable: As for `apply`.
    """
    with_retries(client)
    return [_recurring_run(item) for item in _pages(client, name) if _is_ours(item, name)]


def _pages(client: kfp.Client, name: str) -> Iterator[Any]:
    token = ""
    while True:
        page = client.list_recurring_runs(
            page_token=token,
            page_size=PAGE,
            sort_by="created_at desc",
            namespace=client.get_user_namespace() or None,
            filter=display_name_filter(name) if name else None,
        )
        yield from page.recurring_runs or ()
        token = page.next_page_token or ""
        if not token:
            return


def _is_ours(item: Any, name: str) -> bool:
    return (item.description or "").startswith(DESCRIPTION_PREFIX) and name in (
        "",
        item.display_name,
    )


def _recurring_run(item: Any) -> RecurringRun:
    cron = item.trigger.cron_schedule if item.trigger else None
    return RecurringRun(
        recurring_run_id=item.recurring_run_id,
        name=item.display_name,
        cron=cron.cron if cron else "",
        is_enabled=item.status == ENABLED,
        description=item.description or "",
    )


def _schedule_of(spec: PipelineSpec) -> Schedule:
    if spec.schedule is None:
        raise SettingsError(
            f"{spec.name} has no schedule; add to the spec, for Mondays at 3:00: "
            "schedule: {cron: '0 3 * * 1', time_zone: UTC}"
        )
    return spec.schedule


def _arguments(
    client: kfp.Client, spec: PipelineSpec, schedule: Schedule, target: Target
) -> dict[str, Any]:
    """Arguments of the recurring run; their digest identifies it."""
    version = publish(client, spec, target)
    context = cluster_context(spec, workdir=target.workdir)
    return {
        "experiment_id": experiment_id(client, spec.tracking.experiment),
        "job_name": schedule_name(spec),
        "cron_expression": schedule.server_cron,
        "max_concurrency": schedule.max_concurrency,
        "no_catchup": not schedule.catch_up,
        "params": {"context": context.model_dump_json()},
        "pipeline_id": version.pipeline_id,
        "version_id": version.version_id,
        "service_account": target.service_account or None,
    }


def _arguments_of(item: Any) -> dict[str, Any]:
    """Arguments that create a recurring run like this one."""
    reference, cron = item.pipeline_version_reference, item.trigger.cron_schedule
    return {
        "experiment_id": item.experiment_id,
        "job_name": item.display_name,
        "description": item.description,
        "cron_expression": cron.cron,
        "max_concurrency": int(item.max_concurrency),
        "no_catchup": bool(item.no_catchup),
        "params": dict(item.runtime_config.parameters or {}),
        "pipeline_id": reference.pipeline_id,
        "version_id": reference.pipeline_version_id,
        "service_account": item.service_account,
    }


def _existing(client: kfp.Client, spec: PipelineSpec) -> list[RecurringRun]:
    found = recurring_runs(client, schedule_name(spec))
    if not found:
        raise InputError(
            f"there is no schedule {schedule_name(spec)}; dinopipe schedule SPEC creates one, "
            "dinopipe schedules lists what there is"
        )
    return found


def _create(client: kfp.Client, arguments: dict[str, Any], *, is_enabled: bool) -> RecurringRun:
    made = client.create_recurring_run(**arguments, enabled=is_enabled)
    return _one(client, made.recurring_run_id)


def _one(client: kfp.Client, recurring_run_id: str) -> RecurringRun:
    return _recurring_run(client.get_recurring_run(recurring_run_id))


def _delete(client: kfp.Client, item: RecurringRun) -> None:
    try:
        client.delete_recurring_run(item.recurring_run_id)
    except PipelinesRefused as error:
        if error.status != NOT_FOUND:
            raise
