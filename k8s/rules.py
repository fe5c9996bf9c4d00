"""Checks of manifests that neither schemas, nor Pod Security, nor a server's dry run make.

`kubectl kustomize k8s/overlays/prod-gpu | python -m k8s.rules` before `kubectl apply`. What is
checked: images that are not set or not named by digest, secrets by value, and what Kubeflow Trainer
and Kueue leave undone without an error.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import yaml

from dinov2_core.errors import ExitCode
from k8s.placement import SECRET_NAME, SECRET_VALUE
from k8s.training import PRIORITY_LABEL, QUEUE_LABEL

IMAGE = re.compile(r"[^\s@]+@sha256:[0-9a-f]{64}")
PLACEHOLDER = re.compile(r"^registry\.invalid/|@sha256:0{64}$")
"""In our overlays until an image is set."""
TRAINER_STEP = "trainer.kubeflow.org/trainjob-ancestor-step"
FRAMEWORK = "trainer.kubeflow.org/framework"
RUNTIMES = ("TrainingRuntime", "ClusterTrainingRuntime")

Manifest = Mapping[str, Any]


def problems(manifests: Sequence[Manifest]) -> list[str]:
    """What is wrong with manifests that are applied together.

    Args:
        manifests: All of them, as `kubectl kustomize` builds them.

    Returns:
        Sentences that begin with kind and name of the object; none if all is well.
    """
    names = {(item["kind"], item["metadata"]["name"]) for item in manifests}
    found = []
    for manifest in manifests:
        name = f"{manifest.get('kind')} {(manifest.get('metadata') or {}).get('name')}"
        found += [f"{name}: {problem}" for rule in RULES for problem in rule(manifest)]
        found += [
            f"{name}: refers to {kind} {other}, which is not among these manifests"
            for kind, other in _references(manifest)
            if (kind, other) not in names
        ]
    return found


def mappings(value: object, path: str = "") -> Iterator[tuple[str, Manifest]]:
    """Every mapping in a manifest with its path, outermost first."""
    if isinstance(value, Mapping):
        yield path, value
        for key, item in value.items():
            yield from mappings(item, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from mappings(item, f"{path}[{index}]")


def _images(manifest: Manifest) -> Iterator[str]:
    for path, found in mappings(manifest):
        image = found.get("image")
        if not isinstance(image, str):
            continue
        if PLACEHOLDER.search(image):
            yield f"{path}.image is still the placeholder {image}; set yours in the overlay"
        elif not IMAGE.fullmatch(image):
            yield f"{path}.image {image} has no digest; name it as REGISTRY/NAME@sha256:DIGEST"


def _secrets(manifest: Manifest) -> Iterator[str]:
    if manifest.get("kind") == "Secret":
        yield "is a Secret; create it outside of the manifests, or use components/external-secrets"
    if manifest.get("kind") == "ConfigMap":
        for key, value in (manifest.get("data") or {}).items():
            if re.search(SECRET_VALUE, str(value)):
                yield f"data.{key} looks like a secret; put it in a Secret"
    for path, found in mappings(manifest):
        for variable in found.get("env") or ():
            name, value = str(variable.get("name", "")), str(variable.get("value", ""))
            is_secret = re.search(SECRET_NAME, name) or re.search(SECRET_VALUE, value)
            if value and is_secret:
                yield f"{path}.env has a value for {name}; put it in a Secret and use valueFrom"


def _runtime(manifest: Manifest) -> Iterator[str]:
    """What Kubeflow Trainer finds by name, and silently does without."""
    if manifest.get("kind") not in RUNTIMES:
        return
    if FRAMEWORK not in (manifest["metadata"].get("labels") or {}):
        yield f"lacks the label {FRAMEWORK}"
    spec = manifest["spec"]["template"]["spec"]
    rules = (spec.get("failurePolicy") or {}).get("rules") or ()
    if not any("PodFailurePolicy" in (rule.get("onJobFailureReasons") or ()) for rule in rules):
        yield "failurePolicy has no rule for PodFailurePolicy: wrong input would be retried"
    trainers = [
        job["template"]
        for job in spec["replicatedJobs"]
        if (job["template"].get("metadata") or {}).get("labels", {}).get(TRAINER_STEP) == "trainer"
    ]
    if not trainers:
        yield f"no replicated job has the label {TRAINER_STEP}: trainer"
    for template in trainers:
        yield from _training_pods(template["spec"])


def _training_pods(job: Manifest) -> Iterator[str]:
    pod = job["template"]["spec"]
    if "node" not in {container.get("name") for container in pod["containers"]}:
        yield "no container is named node: Trainer would set neither command nor PET_*"
    if not any(
        "onExitCodes" in rule for rule in (job.get("podFailurePolicy") or {}).get("rules", ())
    ):
        yield "podFailurePolicy has no rule for exit codes: wrong input would be retried"
    if pod.get("restartPolicy") != "Never":
        yield "restartPolicy is not Never, which podFailurePolicy demands"


def _trainjob(manifest: Manifest) -> Iterator[str]:
    if manifest.get("kind") == "TrainJob" and not manifest["spec"].get("trainer", {}).get(
        "numNodes"
    ):
        yield "spec.trainer.numNodes is missing: there would be one node and no PET_*"


RULES: tuple[Callable[[Manifest], Iterator[str]], ...] = (_images, _secrets, _runtime, _trainjob)


def _references(manifest: Manifest) -> Iterator[tuple[str, str]]:
    """Kinds and names without which Kueue and Trainer leave a job waiting for ever."""
    match manifest["kind"]:
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


def _refuse(message: str) -> int:
    sys.stderr.write(f"{message}\n")
    return ExitCode.USER_ERROR


def main() -> int:
    """Read manifests from standard input; 0 if all is well, 2 with what is wrong."""
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
            "kubectl apply --dry-run=server names it"
        )
    return _refuse("\n".join(found)) if found else ExitCode.DONE


if __name__ == "__main__":
    sys.exit(main())
