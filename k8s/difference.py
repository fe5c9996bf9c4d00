"""What of an object we set, and how that differs from what a cluster has, as lines to read."""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from typing import Any

import yaml

from k8s.values import same_quantity

LAST_APPLIED = "kubectl.kubernetes.io/last-applied-configuration"
"""Annotation in which `kubectl apply` keeps what it was given the time before."""
HIDDEN = "(not shown)"
IDENTITIES = ("name", "manager")
"""Keys that tell the items of a list apart; the first that does is taken."""
EMPTY: tuple[Any, ...] = ({}, [], "", None)
"""What an API server may leave out."""
AMOUNTS = ("requests", "limits", "hard", "defaultRequest", "nominalQuota", "sizeLimit")
"""Fields whose values are quantities, or hold them."""
CONTEXT_LINES = 3

Object = dict[str, Any]


def difference(wanted: Object, live: Object, *, is_whole: bool = True) -> list[str]:
    """Unified diff from what is deployed to what we would deploy; empty where they agree.

    Fields count that we set, or that `kubectl apply` set for us the time before: defaults, status
    and what controllers add are left out. Items of a list are matched by name where they have one;
    those that only the cluster has are told by their name alone. Equal quantities (1000m and 1)
    are equal. Values of a Secret are never shown.

    Args:
        wanted: Manifest as we render it.
        live: Object as the API server gives it.
        is_whole: Whether the manifest is all that we set; else what it leaves out does not count.
    """
    before = _last_applied(live) if is_whole else {}
    wanted, live, before = map(without_secrets, (wanted, live, before))
    name = f"{wanted['kind']}/{wanted['metadata']['name']}"
    old, new = (
        yaml.safe_dump(value, sort_keys=True, width=100).splitlines()
        for value in (_restricted(live, _union(wanted, before)), wanted)
    )
    told = difflib.unified_diff(
        old, new, f"deployed/{name}", f"planned/{name}", lineterm="", n=CONTEXT_LINES
    )
    return list(told)


def without_secrets(manifest: Object) -> Object:
    """The same; a Secret keeps its keys, not its values."""
    if manifest.get("kind") != "Secret":
        return manifest
    data = {**(manifest.get("data") or {}), **(manifest.get("stringData") or {})}
    rest = {key: value for key, value in manifest.items() if key not in ("data", "stringData")}
    return rest | {"data": dict.fromkeys(data, HIDDEN)}


def _last_applied(live: Object) -> Object:
    annotations = live["metadata"].get("annotations") or {}
    try:
        found = json.loads(annotations.get(LAST_APPLIED, "{}"))
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _union(new: Any, old: Any) -> Any:
    """The fields of both; where both have one, as the new writes it."""
    if isinstance(new, dict) and isinstance(old, dict):
        both = {key: _union(value, old.get(key)) for key, value in new.items()}
        gone = {key: value for key, value in old.items() if key not in new and value not in EMPTY}
        return both | gone
    if isinstance(new, list) and isinstance(old, list) and (key := _identity(new, old)):
        known = {item[key]: item for item in old}
        return [_union(item, known.pop(item[key], None)) for item in new] + list(known.values())
    return new


def _restricted(live: Any, shape: Any, *, is_amount: bool = False) -> Any:
    """What is deployed, restricted to the fields of a shape and in the order of its items."""
    if isinstance(live, dict) and isinstance(shape, dict):
        return {
            key: _restricted(live[key], inner, is_amount=is_amount or key in AMOUNTS)
            if key in live
            else inner
            for key, inner in shape.items()
            if key in live or inner in EMPTY
        }
    if isinstance(live, list) and isinstance(shape, list):
        key = _identity(live, shape)
        if key is None:
            pairs = zip(live, shape, strict=False)
            return [_restricted(*pair) for pair in pairs] + live[len(shape) :]
        there = {item[key]: item for item in live}
        found = [_restricted(there.pop(item[key]), item) for item in shape if item[key] in there]
        added = [{key: name} for name in there] if key == "name" else []  # others' stay theirs
        return found + added
    return shape if is_amount and same_quantity(live, shape) else live


def _identity(*lists: Sequence[Any]) -> str | None:
    """The key by which the items of lists are told apart; None where only their order does."""
    for key in IDENTITIES:
        if all(_tells_apart(key, items) for items in lists):
            return key
    return None


def _tells_apart(key: str, items: Sequence[Any]) -> bool:
    names = [item[key] for item in items if isinstance(item, dict) and key in item]
    return len(set(names)) == len(items)
