"""Everything that an API server in strict mode refuses and that can be known without one."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import kubernetes_validate
import pydantic
from kubeflow_trainer_api import models

from tests.k8s.custom_kinds import CUSTOM_KINDS

KUBERNETES = "1.36"
TRAINER_KINDS = {
    "TrainJob": models.TrainerV1alpha1TrainJob,
    "TrainingRuntime": models.TrainerV1alpha1TrainingRuntime,
    "JobSet": models.JobsetV1alpha2JobSet,
}
STRATEGIES = ("Recreate", "BlockingRecreate", "InPlaceRestart")
ACTIONS = (
    "FailJobSet",
    "RestartJobSet",
    "RestartJobSetAndIgnoreMaxRestarts",
    "RestartJob",
    "RestartJobAndIgnoreMaxRestarts",
)
REASONS = (
    "BackoffLimitExceeded",
    "DeadlineExceeded",
    "FailedIndexes",
    "MaxFailedIndexesExceeded",
    "PodFailurePolicy",
)


def schema_problems(manifest: dict[str, Any]) -> list[str]:
    """Unknown fields, wrong types and values that the schemas of a manifest's kind refuse."""
    kind = manifest["kind"]
    if kind in TRAINER_KINDS:
        return [
            *_lost_in_models(manifest),
            *_embedded_jobs(manifest),
            *_failure_policy(_jobset_of(manifest)),
        ]
    if kind in CUSTOM_KINDS:
        return _refused_by_model(manifest)
    return _refused_by_kubernetes(manifest)


def _refused_by_kubernetes(manifest: dict[str, Any]) -> list[str]:
    try:
        kubernetes_validate.validate(manifest, KUBERNETES, strict=True)
    except kubernetes_validate.ValidationError as error:
        return [f"{'.'.join(map(str, error.absolute_path))}: {error.message}"]
    return []


def _refused_by_model(manifest: dict[str, Any]) -> list[str]:
    try:
        CUSTOM_KINDS[manifest["kind"]].model_validate_json(json.dumps(manifest))
    except pydantic.ValidationError as error:
        return [f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors()]
    return []


def _lost_in_models(manifest: dict[str, Any]) -> list[str]:
    """The official models drop what they do not know: what does not come back is unknown."""
    try:
        known = TRAINER_KINDS[manifest["kind"]].from_dict(manifest)
    except ValueError as error:
        return [str(error)]
    assert known is not None
    return list(_missing(manifest, known.to_dict(), path=""))


def _missing(given: Any, back: Any, *, path: str) -> Iterator[str]:
    if isinstance(given, dict) and isinstance(back, dict):
        for key, value in given.items():
            where = f"{path}.{key}" if path else key
            if key not in back:
                yield f"{where}: unknown field"
            else:
                yield from _missing(value, back[key], path=where)
    elif isinstance(given, list) and isinstance(back, list):
        for index, (one, other) in enumerate(zip(given, back, strict=True)):
            yield from _missing(one, other, path=f"{path}[{index}]")
    elif given != back:
        yield f"{path}: {given!r} comes back as {back!r}"


def _embedded_jobs(manifest: dict[str, Any]) -> Iterator[str]:
    """A JobSet's jobs are those of Kubernetes, whose schema knows types and values as well."""
    for job in _jobset_of(manifest).get("replicatedJobs", ()):
        template = job.get("template", {})
        whole = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "j"}, **template}
        for problem in _refused_by_kubernetes(whole):
            yield f"replicatedJobs {job.get('name')}: {problem}"


def _jobset_of(manifest: dict[str, Any]) -> dict[str, Any]:
    """The spec of a JobSet, or of the one that a runtime is a template of."""
    spec: dict[str, Any] = manifest["spec"]
    return spec["template"]["spec"] if manifest["kind"] == "TrainingRuntime" else spec


def _failure_policy(jobset: dict[str, Any]) -> Iterator[str]:
    """What the models take for plain strings; from api/jobset/v1alpha2 of kubernetes-sigs/jobset."""
    policy = jobset.get("failurePolicy", {})
    if policy.get("restartStrategy", "Recreate") not in STRATEGIES:
        yield f"failurePolicy.restartStrategy {policy['restartStrategy']}: not one of {STRATEGIES}"
    for rule in policy.get("rules", ()):
        if rule.get("action") not in ACTIONS:
            yield f"failurePolicy action {rule.get('action')}: not one of {ACTIONS}"
        for reason in set(rule.get("onJobFailureReasons", ())) - set(REASONS):
            yield f"failurePolicy reason {reason}: not one of {REASONS}"
        if re.fullmatch(r"[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?", rule.get("name", "r")) is None:
            yield f"failurePolicy rule {rule['name']}: a name has letters, digits and _"
