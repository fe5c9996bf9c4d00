from __future__ import annotations

import subprocess
from importlib.metadata import version

import pytest

from components.runtime.system_facts import package_version, system_facts


def test_versions_are_those_installed() -> None:
    facts = system_facts()
    assert facts["version.mlflow"] == package_version("mlflow") == version("mlflow")
    assert package_version("no-such-package") == "absent"


def test_the_commit_is_the_checkout_s_or_the_image_s(monkeypatch: pytest.MonkeyPatch) -> None:
    head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    if head.returncode == 0:
        assert system_facts()["mlflow.source.git.commit"] == head.stdout.strip()
    monkeypatch.setenv("DINOPIPE_GIT_COMMIT", "abc")
    assert system_facts()["mlflow.source.git.commit"] == "abc"
    monkeypatch.delenv("DINOPIPE_GIT_COMMIT")
    monkeypatch.setenv("PATH", "")
    assert "mlflow.source.git.commit" not in system_facts()
