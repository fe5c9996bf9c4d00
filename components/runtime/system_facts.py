"""What a result may depend on besides settings and inputs: versions, machine, commit."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil

TRACKED_PACKAGES = ("dinopipe", "torch", "mlflow", "numpy", "faiss-cpu", "timm", "kfp")


def system_facts() -> dict[str, str]:
    """What a result may depend on: versions, machine, commit."""
    facts = {f"version.{name}": package_version(name) for name in TRACKED_PACKAGES}
    facts["version.python"] = platform.python_version()
    facts["system.platform"] = platform.platform()
    facts["system.cpus"] = str(len(os.sched_getaffinity(0)))
    facts["system.memory_gib"] = f"{psutil.virtual_memory().total / 2**30:.1f}"
    commit = os.environ.get("DINOPIPE_GIT_COMMIT") or _git_commit()
    if commit:
        facts["mlflow.source.git.commit"] = commit
    return facts


def package_version(package: str) -> str:
    """Installed version of a distribution; `absent` without it."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"


def _git_commit() -> str:
    try:
        answer = subprocess.run(
            ["git", "rev-parse", "HEAD"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=False,
        )
    except OSError:  # no git here
        return ""
    return answer.stdout.strip() if answer.returncode == 0 else ""
