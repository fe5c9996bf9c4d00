from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

BASE = Path(__file__).parents[2] / "k8s" / "base"


def documents() -> list[dict[str, Any]]:
    kustomization = yaml.safe_load((BASE / "kustomization.yaml").read_text())
    return [
        document
        for name in kustomization["resources"]
        for document in yaml.safe_load_all((BASE / name).read_text())
    ]


def test_every_manifest_is_listed_and_every_listed_one_exists() -> None:
    listed = set(yaml.safe_load((BASE / "kustomization.yaml").read_text())["resources"])
    assert listed == {path.name for path in BASE.glob("*.yaml")} - {"kustomization.yaml"}


def test_objects_are_named_once_and_hold_no_secret() -> None:
    names = [(item["kind"], item["metadata"]["name"]) for item in documents()]
    assert len(names) == len(set(names))
    assert "Secret" not in {kind for kind, _ in names}


def test_the_namespace_enforces_the_restricted_profile() -> None:
    (namespace,) = (item for item in documents() if item["kind"] == "Namespace")
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"


def test_stage_pods_get_no_token() -> None:
    (account,) = (item for item in documents() if item["kind"] == "ServiceAccount")
    assert account["automountServiceAccountToken"] is False
