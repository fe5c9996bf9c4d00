"""How what a spec becomes on a cluster differs from the objects that are there."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from dinov2_core.errors import ClusterRefused, ClusterUnavailable
from k8s.cluster import Cluster
from k8s.deployed import CannotTell, Deployed
from k8s.difference import difference
from k8s.job_kind import JobKind
from k8s.launchers import RUNTIME
from k8s.training import RUN_LABEL, STAGE_LABEL
from pipelines.cluster.submit import Target
from pipelines.plan.jobs import PHASES, RUN, SET_BY_STEP, WORK, RanksPhase, planned_job
from pipelines.spec.pipeline_spec import PipelineSpec

BASE_RUNTIME = Path(__file__).parents[2] / "k8s" / "base" / "runtime.yaml"
PLANNED, DIFFERENT, ABSENT = "as planned", "different", "not deployed"
UNKNOWN = "cannot tell"

Object = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """One object, planned and deployed."""

    name: str
    """Kind, namespace and name."""
    verdict: str
    """`as planned`, `different`, `not deployed`, or `cannot tell`."""
    lines: tuple[str, ...] = ()
    """The difference, or why it is not known."""

    @classmethod
    def of(cls, wanted: Object, live: Object | None, *, is_whole: bool = True) -> Comparison:
        """What a person reads of an object that was looked up."""
        name = _name(wanted)
        if live is None:
            return cls(name=name, verdict=ABSENT)
        lines = tuple(difference(wanted, live, is_whole=is_whole))
        return cls(name=name, verdict=DIFFERENT if lines else PLANNED, lines=lines)


def compared_with_cluster(
    spec: PipelineSpec, target: Target, *, manifests: Sequence[Object], cluster: Cluster
) -> list[Comparison]:
    """Every object that a run of the spec makes or needs, beside what the cluster has.

    Jobs carry the identity of their run in their names: one is held against the newest job of the
    same stage and run name, rendered as this spec would have it in that run. The runtime that they
    refer to is held against ours; with manifests, each of those against its object.

    Args:
        spec: Checked spec.
        target: Where on the cluster it works.
        manifests: What kustomize builds; may be empty.
        cluster: Client with the spec's namespace.

    Raises:
        ClusterRefused: The API server does not take this account at all.
        ClusterUnavailable: It does not answer.
    """
    deployed = Deployed(cluster)
    found = []
    for phase in PHASES:
        planned = planned_job(phase, spec, target)
        if planned is not None:
            found.append(_job(phase, spec, target, planned=planned, deployed=deployed))
    known = {_name(manifest) for manifest in manifests}
    found += [
        _object(runtime, deployed, is_whole=False)
        for runtime in _runtimes(spec)
        if _name(runtime) not in known
    ]
    return found + [_object(manifest, deployed) for manifest in manifests]


def cluster_report(comparisons: Sequence[Comparison], *, namespace: str) -> str:
    """The comparisons as text: a count, what is missing or not known, then the differences."""
    counts = Counter(item.verdict for item in comparisons)
    told = ", ".join(f"{count} {verdict}" for verdict, count in counts.items())
    lines = [f"objects on the cluster (namespace {namespace}): {told or 'none to compare'}"]
    lines += [f"{item.name} is not deployed" for item in comparisons if item.verdict == ABSENT]
    for item in comparisons:
        if item.verdict == UNKNOWN:
            lines.append(f"{item.name}: cannot tell: {' '.join(item.lines)}")
    for item in comparisons:
        if item.verdict == DIFFERENT:
            lines += [f"{item.name} is different", *item.lines]
    return "\n".join(lines)


def compare_or_say_why(spec: PipelineSpec, target: Target, *, manifests: Sequence[Object]) -> str:
    """The report on the cluster that this shell or pod is connected to, or why there is none."""
    namespace = spec.placement.namespace
    try:
        cluster = Cluster.connected(namespace)
        found = compared_with_cluster(spec, target, manifests=manifests, cluster=cluster)
    except (ClusterRefused, ClusterUnavailable) as error:
        return f"objects on the cluster (namespace {namespace}): cannot tell: {error}"
    return cluster_report(found, namespace=namespace)


def _object(wanted: Object, deployed: Deployed, *, is_whole: bool = True) -> Comparison:
    try:
        live = deployed.find(wanted)
    except CannotTell as error:
        return Comparison(name=_name(wanted), verdict=UNKNOWN, lines=(str(error),))
    return Comparison.of(wanted, live, is_whole=is_whole)


def _job(
    phase: RanksPhase,
    spec: PipelineSpec,
    target: Target,
    *,
    planned: tuple[JobKind, Object],
    deployed: Deployed,
) -> Comparison:
    """The planned job of a stage beside the newest one of an earlier run."""
    kind, wanted = planned
    stage = {STAGE_LABEL: wanted["metadata"]["labels"][STAGE_LABEL]}
    try:
        jobs = deployed.jobs(kind, labels=stage)
    except CannotTell as error:
        return Comparison(name=_name(wanted), verdict=UNKNOWN, lines=(str(error),))
    for live in jobs:
        again = planned_job(phase, spec, target, run=_run(live), work=_work(live, phase))
        assert again is not None
        wanted = again[1]
        if wanted["metadata"]["name"] == live["metadata"]["name"]:
            set_here = set(SET_BY_STEP).difference(_names(wanted))
            return Comparison.of(wanted, _without(live, names=set_here))
    return Comparison.of(planned[1], None)


def _run(job: Object) -> str:
    return str(job["metadata"].get("labels", {}).get(RUN_LABEL, RUN))


def _work(job: Object, phase: RanksPhase) -> str:
    """Name of the directory in which a job's command finds what to do."""
    found = re.search(rf"/stages/{phase}/([^/\"]+)/job\.json", json.dumps(job.get("spec")))
    return found[1] if found else WORK


def _runtimes(spec: PipelineSpec) -> Iterable[Object]:
    """The runtime that the spec's TrainJobs refer to, as far as we know what it should be."""
    launcher = spec.placement.launcher
    if launcher.kind != "trainjob":
        return
    ours: Object = yaml.safe_load(BASE_RUNTIME.read_text(encoding="utf-8"))
    name = {"name": launcher.runtime, "namespace": spec.placement.namespace}
    if launcher.runtime != RUNTIME:
        yield {"apiVersion": ours["apiVersion"], "kind": ours["kind"], "metadata": name}
        return
    for job in ours["spec"]["template"]["spec"]["replicatedJobs"]:
        for container in job["template"]["spec"]["template"]["spec"]["containers"]:
            del container["image"]  # that of the TrainJob counts
    yield ours | {"metadata": ours["metadata"] | name}


def _names(value: object) -> set[str]:
    """Every name in a manifest, those of variables among them."""
    return set(re.findall(r'"name": "([^"]*)"', json.dumps(value)))


def _without(value: Any, *, names: set[str]) -> Any:
    """The same without list items of these names."""
    if isinstance(value, dict):
        return {key: _without(item, names=names) for key, item in value.items()}
    if isinstance(value, list):
        kept = [
            item for item in value if not (isinstance(item, dict) and item.get("name") in names)
        ]
        return [_without(item, names=names) for item in kept]
    return value


def _name(manifest: Object) -> str:
    metadata = manifest["metadata"]
    place = f"{metadata['namespace']}/" if "namespace" in metadata else ""
    return f"{manifest['kind']} {place}{metadata['name']}"
