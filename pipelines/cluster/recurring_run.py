"""The one recurring run of a spec: made, replaced, paused, resumed, deleted."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import kfp

from components.runtime.manifests import digest_of
from pipelines.cluster.client import ClusterError, be_patient
from pipelines.cluster.submit import (
    PAGE,
    Target,
    check_fits_cluster,
    cluster_context,
    experiment_id,
    named,
    publish,
)
from pipelines.spec.pipeline_spec import PipelineSpec
from pipelines.spec.schedule import Schedule

MARK = "dinopipe schedule "
"""Begins the description of every recurring run made here; its digest follows."""
ENABLED = "ENABLED"
NOT_FOUND = 404

Outcome = Literal["created", "unchanged", "replaced"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheduled:
    """A recurring run on the server."""

    recurring_run_id: str
    name: str
    cron: str
    """Six fields, in the time zone of the scheduler."""
    is_enabled: bool
    description: str

    @property
    def digest(self) -> str:
        """Of what it was made from."""
        return self.description.removeprefix(MARK).partition(": ")[0]

    @property
    def said(self) -> str:
        """The schedule as its spec says it, with its time zone."""
        return self.description.partition(": ")[2]


def schedule_name(spec: PipelineSpec) -> str:
    """Name of a spec's recurring run."""
    return f"dinopipe-{spec.name}"


def apply(client: kfp.Client, spec: PipelineSpec, target: Target) -> tuple[Scheduled, Outcome]:
    """See that exactly one recurring run stands for a spec; one that was paused stays paused.

    Args:
        client: Any client.
        spec: Checked spec with a schedule.
        target: Where its runs work.

    Raises:
        ValueError: The spec has no schedule.
        SpecError: The spec names places that pods cannot see.
        ClusterError: The server did not do it; doing it again continues.
    """
    schedule = _schedule_of(spec)
    be_patient(client)
    check_fits_cluster(client, spec, target)
    wanted = _wanted(client, spec, schedule, target)
    digest = digest_of(wanted)
    said = f"'{schedule.cron}' {schedule.time_zone}"
    wanted["description"] = f"{MARK}{digest}: {said}"
    found = recurring_runs(client, schedule_name(spec))
    equal = [item for item in found if item.digest == digest]
    if not found:
        return _create(client, wanted, is_enabled=True), "created"
    if len(found) == 1 and equal:
        return found[0], "unchanged"
    # The new one is asleep until the others are gone, so that no two ever fire.
    was_enabled = any(item.is_enabled for item in found)
    new = equal[0] if equal else _create(client, wanted, is_enabled=False)
    for item in found:
        if item.recurring_run_id != new.recurring_run_id:
            _delete(client, item)
    if was_enabled and not new.is_enabled:
        client.enable_recurring_run(new.recurring_run_id)
    return _one(client, new.recurring_run_id), "replaced"


def pause(client: kfp.Client, spec: PipelineSpec) -> Scheduled:
    """Stop firing until `resume`.

    Raises:
        ValueError: The spec has no recurring run there.
        ClusterError: The server did not do it.
    """
    for item in _existing(client, spec):
        if item.is_enabled:
            client.disable_recurring_run(item.recurring_run_id)
    return _existing(client, spec)[0]


def resume(client: kfp.Client, spec: PipelineSpec) -> Scheduled:
    """Fire again, from the next time on.

    A recurring run that is merely enabled again fires at once for the time it last missed, even
    without catch-up; so it is made anew, which has missed nothing.

    Raises:
        ValueError: The spec has no recurring run there.
        ClusterError: The server did not do it.
    """
    found = _existing(client, spec)
    live = next((item for item in found if item.is_enabled), None)
    if live is None:
        old = client.get_recurring_run(found[0].recurring_run_id)
        live = _create(client, _as_given(old), is_enabled=True)
    for item in found:
        if item.recurring_run_id != live.recurring_run_id:
            _delete(client, item)
    return live


def delete(client: kfp.Client, spec: PipelineSpec) -> None:
    """Remove it; runs that it has started go on.

    Raises:
        ValueError: The spec has no recurring run there.
        ClusterError: The server did not do it.
    """
    for item in _existing(client, spec):
        _delete(client, item)


def recurring_runs(client: kfp.Client, name: str = "") -> list[Scheduled]:
    """Recurring runs made here, newest first; of one spec if its name is given.

    Raises:
        ClusterError: The server does not answer.
    """
    be_patient(client)
    return [_scheduled(item) for item in _pages(client, name) if _is_ours(item, name)]


def _pages(client: kfp.Client, name: str) -> Iterator[Any]:
    token = ""
    while True:
        page = client.list_recurring_runs(
            page_token=token,
            page_size=PAGE,
            sort_by="created_at desc",
            namespace=client.get_user_namespace() or None,
            filter=named(name) if name else None,
        )
        yield from page.recurring_runs or ()
        token = page.next_page_token or ""
        if not token:
            return


def _is_ours(item: Any, name: str) -> bool:
    return (item.description or "").startswith(MARK) and name in ("", item.display_name)


def _scheduled(item: Any) -> Scheduled:
    cron = item.trigger.cron_schedule if item.trigger else None
    return Scheduled(
        recurring_run_id=item.recurring_run_id,
        name=item.display_name,
        cron=cron.cron if cron else "",
        is_enabled=item.status == ENABLED,
        description=item.description or "",
    )


def _schedule_of(spec: PipelineSpec) -> Schedule:
    if spec.schedule is None:
        raise ValueError(
            f"{spec.name} has no schedule; add to the spec, for Mondays at 3:00: "
            "schedule: {cron: '0 3 * * 1', time_zone: UTC}"
        )
    return spec.schedule


def _wanted(
    client: kfp.Client, spec: PipelineSpec, schedule: Schedule, target: Target
) -> dict[str, Any]:
    """Arguments of the recurring run, and thereby what it is known by."""
    version = publish(client, spec, target)
    context = cluster_context(spec, workdir=target.workdir)
    return {
        "experiment_id": experiment_id(client, spec.tracking.experiment),
        "job_name": schedule_name(spec),
        "cron_expression": str(schedule.server_cron),
        "max_concurrency": schedule.max_concurrency,
        "no_catchup": not schedule.catch_up,
        "params": {"context": context.model_dump_json()},
        "pipeline_id": version.pipeline_id,
        "version_id": version.version_id,
        "service_account": target.service_account or None,
    }


def _as_given(item: Any) -> dict[str, Any]:
    """Arguments that make a recurring run like this one."""
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


def _existing(client: kfp.Client, spec: PipelineSpec) -> list[Scheduled]:
    found = recurring_runs(client, schedule_name(spec))
    if not found:
        raise ValueError(
            f"there is no schedule {schedule_name(spec)}; dinopipe schedule SPEC makes one, "
            "dinopipe schedules lists what there is"
        )
    return found


def _create(client: kfp.Client, arguments: dict[str, Any], *, is_enabled: bool) -> Scheduled:
    made = client.create_recurring_run(**arguments, enabled=is_enabled)
    return _one(client, made.recurring_run_id)


def _one(client: kfp.Client, recurring_run_id: str) -> Scheduled:
    return _scheduled(client.get_recurring_run(recurring_run_id))


def _delete(client: kfp.Client, item: Scheduled) -> None:
    try:
        client.delete_recurring_run(item.recurring_run_id)
    except ClusterError as error:
        if error.status != NOT_FOUND:
            raise
