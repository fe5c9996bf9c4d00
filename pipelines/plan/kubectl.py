"""What kubectl does for a plan: it builds overlays and compares them with a cluster."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import yaml

from dinov2_core.errors import SettingsError

OVERLAYS = Path(__file__).parents[2] / "k8s" / "overlays"
KUSTOMIZATION = "kustomization.yaml"
HIDDEN = "(not shown)"

Object = dict[str, Any]


def overlay_directory(overlay: str) -> Path:
    """The directory of an overlay.

    Args:
        overlay: One that we ship, such as `prod-gpu`, or a directory with a kustomization.yaml.

    Raises:
        SettingsError: There is no such overlay.
    """
    for directory in (Path(overlay), OVERLAYS / overlay):
        if (directory / KUSTOMIZATION).is_file():
            return directory
    known = ", ".join(sorted(path.name for path in OVERLAYS.iterdir()))
    raise SettingsError(
        f"--overlay {overlay} does not exist; choose one of {known}, or a directory with a "
        f"{KUSTOMIZATION}"
    )


def built_manifests(overlay: str) -> list[Object]:
    """What kustomize builds of an overlay; Secrets keep their keys, not their values.

    Raises:
        SettingsError: There is no such overlay, kustomize refuses it, or kubectl is missing.
    """
    directory = overlay_directory(overlay)
    try:
        done = _run(["kubectl", "kustomize", str(directory)])
    except FileNotFoundError as error:
        raise SettingsError("--overlay needs kubectl; install it, or leave the flag out") from error
    if done.returncode:
        raise SettingsError(f"kustomize refuses {directory}: {done.stderr.strip()}")
    return [_without_secret_values(item) for item in yaml.safe_load_all(done.stdout) if item]


def diff_with_cluster(overlay: str) -> str:
    """What `kubectl diff` reports: how a server-side dry run of the overlay changes its objects.

    The cluster is the one of the current kubeconfig.

    Raises:
        SettingsError: There is no such overlay.
    """
    command = ["kubectl", "diff", "-k", str(overlay_directory(overlay))]
    text = " ".join(command)
    try:
        done = _run(command)
    except FileNotFoundError:
        return f"objects of {overlay}: kubectl is not installed here; run: {text}"
    if done.returncode > 1:
        return f"objects of {overlay} cannot be compared: {text}: {done.stderr.strip()}"
    if done.returncode == 1:
        return f"objects of {overlay}, by {text}:\n{done.stdout.rstrip()}"
    return f"objects of {overlay} are as deployed"


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False)


def _without_secret_values(manifest: Object) -> Object:
    if manifest.get("kind") != "Secret":
        return manifest
    data = {**(manifest.get("data") or {}), **(manifest.get("stringData") or {})}
    rest = {key: value for key, value in manifest.items() if key not in ("data", "stringData")}
    return rest | {"data": dict.fromkeys(data, HIDDEN)}
