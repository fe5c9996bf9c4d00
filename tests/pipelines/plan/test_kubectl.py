"""kubectl as a plan runs it: the real one, and one whose answers are fixed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import yaml

from dinov2_core.errors import SettingsError
from pipelines.plan.kubectl import OVERLAYS, built_manifests, diff_with_cluster


def test_secrets_of_an_overlay_of_ones_own_are_not_shown(kubectl: Path, tmp_path: Path) -> None:
    secret = {"name": "store", "namespace": "team", "literals": ["password=hush-hush"]}
    (tmp_path / "kustomization.yaml").write_text(yaml.safe_dump({"secretGenerator": [secret]}))
    (manifest,) = built_manifests(str(tmp_path))
    assert manifest["data"] == {"password": "(not shown)"}


def test_an_unknown_or_broken_overlay_is_refused(kubectl: Path, tmp_path: Path) -> None:
    with pytest.raises(
        SettingsError, match="--overlay nowhere does not exist; choose one of dev-cpu"
    ):
        built_manifests("nowhere")
    (tmp_path / "kustomization.yaml").write_text("resources: [missing.yaml]")
    with pytest.raises(SettingsError, match=r"kustomize refuses .*missing\.yaml"):
        built_manifests(str(tmp_path))


def test_an_overlay_needs_kubectl(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(
        SettingsError, match="--overlay needs kubectl; install it, or leave the flag"
    ):
        built_manifests("prod-gpu")


def put_kubectl(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """A program of this name, first in the shell's path."""
    program = folder / "kubectl"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


def test_a_difference_is_what_kubectl_reports_of_the_overlay(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    put_kubectl(tmp_path, monkeypatch, 'echo "-replicas: 1"; echo "+$*"; exit 1')
    folder = OVERLAYS / "prod-gpu"
    assert diff_with_cluster("prod-gpu").splitlines() == [
        f"objects of prod-gpu, by kubectl diff -k {folder}:",
        "-replicas: 1",
        f"+diff -k {folder}",
    ]


def test_no_difference_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    put_kubectl(tmp_path, monkeypatch, "exit 0")
    assert diff_with_cluster("dev-cpu") == "objects of dev-cpu are as deployed"


def test_a_cluster_that_does_not_answer_is_reported_with_the_command(
    kubectl: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = tmp_path / "kubeconfig"
    cluster = {"name": "k", "cluster": {"server": "http://127.0.0.1:1"}}
    context = {"name": "c", "context": {"cluster": "k", "user": "u"}}
    config.write_text(
        yaml.safe_dump({"current-context": "c", "clusters": [cluster], "contexts": [context]})
    )
    monkeypatch.setenv("KUBECONFIG", str(config))
    report = diff_with_cluster("dev-cpu")
    assert report.startswith("objects of dev-cpu cannot be compared: kubectl diff -k ")
    assert "connection refused" in report


def test_without_kubectl_the_command_is_printed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    command = f"kubectl diff -k {OVERLAYS / 'prod-gpu'}"
    assert diff_with_cluster("prod-gpu") == (
        f"objects of prod-gpu: kubectl is not installed here; run: {command}"
    )
    with pytest.raises(SettingsError, match="--overlay nowhere does not exist"):
        diff_with_cluster("nowhere")
