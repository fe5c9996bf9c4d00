"""What a pod may not be: root, open to its node, unlimited, or the bearer of a secret's value."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from k8s.placement import SECRET_NAME, SECRET_VALUE

IMAGE = re.compile(r"[^\s@]+@sha256:[0-9a-f]{64}")
PLACEHOLDER = re.compile(r"^registry\.invalid/|@sha256:0{64}$")
"""What stands in our overlays until somebody sets an image."""

Found = Mapping[str, Any]
"""A piece of a manifest."""


def nested(value: object, path: str = "") -> Iterator[tuple[str, Found]]:
    """Every mapping in a manifest with its path, outermost first."""
    if isinstance(value, Mapping):
        yield path, value
        for key, item in value.items():
            yield from nested(item, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from nested(item, f"{path}[{index}]")


def pods_of(manifest: Found) -> Iterator[tuple[str, Found]]:
    """Every whole pod in a manifest; patches of a runtime are none."""
    for path, found in nested(manifest):
        if isinstance(found.get("containers"), list) and "runtimePatches" not in path:
            yield path, found


def containers_of(pod: Found) -> Iterator[tuple[str, Found]]:
    """Every container of a pod with its path in it."""
    for group in ("initContainers", "containers", "ephemeralContainers"):
        for index, container in enumerate(pod.get(group) or ()):
            yield f"{group}[{index}]", container


def image_problems(manifest: Found) -> Iterator[str]:
    """Images that are not named by their content, or are not set yet."""
    for path, found in nested(manifest):
        image = found.get("image")
        if not isinstance(image, str):
            continue
        if PLACEHOLDER.search(image):
            yield f"{path}.image is still the placeholder {image}; set yours in the overlay"
        elif not IMAGE.fullmatch(image):
            yield f"{path}.image {image} has no digest; name it as REGISTRY/NAME@sha256:DIGEST"


def environment_problems(manifest: Found) -> Iterator[str]:
    """Variables that Kubeflow Trainer sets itself, and secrets by value."""
    for path, found in nested(manifest):
        for variable in found.get("env") or ():
            name, value = str(variable.get("name", "")), str(variable.get("value", ""))
            if name.startswith("PET_"):
                yield f"{path}.env sets {name}, which Kubeflow Trainer sets; take it out"
            is_secret = re.search(SECRET_NAME, name) or re.search(SECRET_VALUE, value)
            if value and is_secret:
                yield f"{path}.env has a value for {name}; put it in a Secret and use valueFrom"


def pod_problems(pod: Found) -> Iterator[str]:
    """What the profile `restricted` and our own rules refuse of a pod."""
    for key in ("hostNetwork", "hostPID", "hostIPC"):
        if pod.get(key):
            yield f"{key} is set; take it out"
    if pod.get("automountServiceAccountToken") is not False:
        yield "automountServiceAccountToken is not false: it would get a token without need"
    security = pod.get("securityContext") or {}
    if security.get("runAsNonRoot") is not True:
        yield "securityContext.runAsNonRoot is not true"
    if (security.get("seccompProfile") or {}).get("type") not in ("RuntimeDefault", "Localhost"):
        yield "securityContext.seccompProfile.type is not RuntimeDefault"
    for volume in pod.get("volumes") or ():
        if "hostPath" in volume:
            yield f"volume {volume.get('name')} is a directory of the node; use a claim or emptyDir"
    for path, container in containers_of(pod):
        for problem in _container_problems(container):
            yield f"{path} {container.get('name')}: {problem}"


def _container_problems(container: Found) -> Iterator[str]:
    security = container.get("securityContext") or {}
    capabilities = security.get("capabilities") or {}
    if security.get("privileged"):
        yield "securityContext.privileged is set; take it out"
    if security.get("allowPrivilegeEscalation") is not False:
        yield "securityContext.allowPrivilegeEscalation is not false"
    if security.get("readOnlyRootFilesystem") is not True:
        yield "securityContext.readOnlyRootFilesystem is not true; give it emptyDirs to write to"
    if security.get("runAsNonRoot") is False or security.get("runAsUser") == 0:
        yield "securityContext lets it run as root"
    if "ALL" not in (capabilities.get("drop") or ()):
        yield "securityContext.capabilities.drop lacks ALL"
    if set(capabilities.get("add") or ()) - {"NET_BIND_SERVICE"}:
        yield f"securityContext.capabilities.add {capabilities['add']}; take it out"
    if any("hostPort" in port for port in container.get("ports") or ()):
        yield "has a hostPort; use a Service"
    resources = container.get("resources") or {}
    missing = {"cpu", "memory"} - set(resources.get("requests") or ())
    if missing:
        yield f"resources.requests lacks {' and '.join(sorted(missing))}"
    if "memory" not in (resources.get("limits") or ()):
        yield "resources.limits lacks memory"
