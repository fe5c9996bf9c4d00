"""What is wrong with a set of manifests although Kubernetes would take it.

`kubectl kustomize k8s/overlays/prod-gpu | python -m k8s.rules` before `kubectl apply`.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import yaml

from k8s.placement import SECRET_VALUE
from k8s.pod_rules import (
    Found,
    environment_problems,
    image_problems,
    nested,
    pod_problems,
    pods_of,
)
from k8s.training import PRIORITY_LABEL, QUEUE_LABEL

CLUSTER_WIDE = frozenset(
    {
        "Namespace",
        "ClusterRole",
        "ClusterRoleBinding",
        "ClusterQueue",
        "ResourceFlavor",
        "WorkloadPriorityClass",
        "Topology",
        "ClusterTrainingRuntime",
    }
)
"""Kinds that live in no namespace."""

ACCESS_TO_EVERYTHING = frozenset({"*", "bind", "escalate", "impersonate"})
TRAINER_STEP = "trainer.kubeflow.org/trainjob-ancestor-step"
FRAMEWORK = "trainer.kubeflow.org/framework"


def problems(manifests: Sequence[Found]) -> list[str]:
    """What is wrong with manifests that are applied together.

    Args:
        manifests: All of them, as `kubectl kustomize` gives them.

    Returns:
        Sentences that begin with kind and name of the object; none when all is well.
    """
    found = [
        f"{name_of(manifest)}: {problem}"
        for manifest in manifests
        for rule in OF_ONE
        for problem in rule(manifest)
    ]
    return found + [problem for rule in OF_ALL for problem in rule(manifests)]


def name_of(manifest: Found) -> str:
    """Kind and name of an object, for people."""
    return f"{manifest.get('kind')} {(manifest.get('metadata') or {}).get('name')}"


def _pods(manifest: Found) -> Iterator[str]:
    for path, pod in pods_of(manifest):
        for problem in pod_problems(pod):
            yield f"{path}: {problem}"


def _secrets(manifest: Found) -> Iterator[str]:
    """Secrets are named, never shipped."""
    if manifest.get("kind") == "Secret":
        yield "is a Secret; make it outside of the manifests, or use components/external-secrets"
    if manifest.get("kind") == "ConfigMap":
        for key, value in (manifest.get("data") or {}).items():
            if re.search(SECRET_VALUE, str(value)):
                yield f"data.{key} looks like a secret; put it in a Secret"


def _role(manifest: Found) -> Iterator[str]:
    if manifest.get("kind") not in ("Role", "ClusterRole"):
        return
    for rule in manifest.get("rules") or ():
        for key in ("apiGroups", "resources", "verbs"):
            wide = ACCESS_TO_EVERYTHING & set(rule.get(key) or ())
            if wide:
                yield f"{key} has {', '.join(sorted(wide))}; name what is needed"
        if "secrets" in (rule.get("resources") or ()) and not rule.get("resourceNames"):
            yield "may read every Secret; name them in resourceNames"


def _runtime(manifest: Found) -> Iterator[str]:
    """What Kubeflow Trainer finds by name and silently does without."""
    if manifest.get("kind") not in ("TrainingRuntime", "ClusterTrainingRuntime"):
        return
    if FRAMEWORK not in (manifest["metadata"].get("labels") or {}):
        yield f"lacks the label {FRAMEWORK}"
    spec = manifest["spec"]["template"]["spec"]
    rules = (spec.get("failurePolicy") or {}).get("rules") or ()
    if not any("PodFailurePolicy" in (rule.get("onJobFailureReasons") or ()) for rule in rules):
        yield "failurePolicy has no rule for PodFailurePolicy: wrong input would be tried again"
    trainers = [
        job["template"]
        for job in spec["replicatedJobs"]
        if (job["template"].get("metadata") or {}).get("labels", {}).get(TRAINER_STEP) == "trainer"
    ]
    if not trainers:
        yield f"no replicated job has the label {TRAINER_STEP}: trainer"
    for template in trainers:
        yield from _training_pods(template["spec"])


def _training_pods(job: Found) -> Iterator[str]:
    pod = job["template"]["spec"]
    if "node" not in {container.get("name") for container in pod["containers"]}:
        yield "no container is called node: Trainer would set neither command nor PET_*"
    if not any(
        "onExitCodes" in rule for rule in (job.get("podFailurePolicy") or {}).get("rules", ())
    ):
        yield "podFailurePolicy has no rule for exit codes: wrong input would be tried again"
    if pod.get("restartPolicy") != "Never":
        yield "restartPolicy is not Never, which podFailurePolicy demands"


def _trainjob(manifest: Found) -> Iterator[str]:
    if manifest.get("kind") == "TrainJob" and not manifest["spec"].get("trainer", {}).get(
        "numNodes"
    ):
        yield "spec.trainer.numNodes is missing: there would be no PET_*, and one node"


def _names(manifests: Sequence[Found]) -> Iterator[str]:
    """Every object once, in the one namespace or in none."""
    keys = Counter(
        (item["apiVersion"], name_of(item), item["metadata"].get("namespace")) for item in manifests
    )
    yield from (f"{key[1]}: is there {count} times" for key, count in keys.items() if count > 1)
    for item in manifests:
        has_namespace = "namespace" in item["metadata"]
        if has_namespace and item["kind"] in CLUSTER_WIDE:
            yield f"{name_of(item)}: has a namespace, but lives in none"
        if not has_namespace and item["kind"] not in CLUSTER_WIDE:
            yield f"{name_of(item)}: has no namespace"
    namespaces = {item["metadata"].get("namespace") for item in manifests} - {None}
    if len(namespaces) > 1:
        yield f"objects are in several namespaces: {', '.join(sorted(namespaces))}"


def _selectors(manifests: Sequence[Found]) -> Iterator[str]:
    """A selector of ours chooses pods of ours."""
    labels = [
        item["spec"]["template"]["metadata"].get("labels") or {}
        for item in manifests
        if item["kind"] in ("Deployment", "StatefulSet")
    ]
    for item in manifests:
        match item["kind"]:
            case "Service":
                wanted = item["spec"].get("selector") or {}
            case "Deployment" | "StatefulSet" | "PodDisruptionBudget":
                wanted = item["spec"]["selector"].get("matchLabels") or {}
            case _:
                continue
        if not wanted or not any(wanted.items() <= given.items() for given in labels):
            yield f"{name_of(item)}: its selector {wanted} chooses no pod of these manifests"


def _references(manifests: Sequence[Found]) -> Iterator[str]:
    """Every object that another one names is there; Secrets come from outside."""
    there = {(item["kind"], item["metadata"]["name"]) for item in manifests}
    for item in manifests:
        for kind, name in _named_by(item):
            if (kind, name) not in there:
                yield f"{name_of(item)}: names {kind} {name}, which is not among these manifests"


def _named_by(manifest: Found) -> Iterator[tuple[str, str]]:
    for _, pod in pods_of(manifest):
        if "serviceAccountName" in pod:
            yield "ServiceAccount", pod["serviceAccountName"]
    for _, found in nested(manifest.get("spec") or {}):
        for key in ("configMapKeyRef", "configMapRef"):
            if key in found:
                yield "ConfigMap", found[key]["name"]
        if "persistentVolumeClaim" in found:
            yield "PersistentVolumeClaim", found["persistentVolumeClaim"]["claimName"]
    match manifest["kind"]:
        case "RoleBinding":
            yield manifest["roleRef"]["kind"], manifest["roleRef"]["name"]
            here = manifest["metadata"].get("namespace")
            for subject in manifest["subjects"]:
                if subject.get("namespace") == here:  # others come with another installation
                    yield subject["kind"], subject["name"]
        case "LocalQueue":
            yield "ClusterQueue", manifest["spec"]["clusterQueue"]
        case "ClusterQueue":
            for group in manifest["spec"]["resourceGroups"]:
                yield from (("ResourceFlavor", flavor["name"]) for flavor in group["flavors"])
        case "TrainJob":
            runtime = manifest["spec"]["runtimeRef"]
            yield runtime.get("kind", "ClusterTrainingRuntime"), runtime["name"]
    labels = manifest["metadata"].get("labels") or {}
    for label, kind in ((QUEUE_LABEL, "LocalQueue"), (PRIORITY_LABEL, "WorkloadPriorityClass")):
        if label in labels:
            yield kind, labels[label]


OF_ONE: tuple[Callable[[Found], Iterator[str]], ...] = (
    image_problems,
    environment_problems,
    _pods,
    _secrets,
    _role,
    _runtime,
    _trainjob,
)
OF_ALL: tuple[Callable[[Sequence[Found]], Iterator[str]], ...] = (_names, _selectors, _references)


def _refuse(message: str) -> int:
    sys.stderr.write(f"{message}\n")
    return 2


def main() -> int:
    """Read manifests from standard input; 0 when all is well, 2 with what is wrong."""
    try:
        manifests: list[Any] = [item for item in yaml.safe_load_all(sys.stdin) if item]
    except yaml.YAMLError as error:
        return _refuse(f"standard input is not YAML: {error}")
    if not manifests:
        return _refuse("no manifests on standard input; kubectl kustomize DIR | ...")
    try:
        found = problems(manifests)
    except (KeyError, TypeError, AttributeError) as error:
        return _refuse(
            f"some manifest is not of the shape of its kind ({type(error).__name__}: {error}); "
            "kubectl apply --dry-run=server says which"
        )
    sys.stderr.write("".join(f"{problem}\n" for problem in found))
    return 2 if found else 0


if __name__ == "__main__":
    sys.exit(main())
