"""Passwords and keys that do not belong into a spec, because compiled pipelines show them."""

from __future__ import annotations

import re

PATTERNS = (
    (re.compile(r"https?://[^/@\s]+@|//[^/@\s]*:[^/@\s]*@"), "a password or token"),
    (
        re.compile(
            r"[?&](x-amz-(signature|credential|security-token)|sig|token|access_token|password"
            r"|secret|api_?key)=",
            re.IGNORECASE,
        ),
        "a signature or token",
    ),
    (re.compile(r"\b(AKIA|ASIA)[0-9A-Z]{16}\b"), "an access key of AWS"),
    (re.compile(r"\bhf_[A-Za-z0-9]{30,}\b"), "a token of Hugging Face"),
    (re.compile(r"\beyJ[\w-]{10,}\.[\w-]{10,}\.[\w-]{10,}"), "a bearer token"),
)
ADVICE = (
    "take it out and set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or "
    "MLFLOW_TRACKING_TOKEN, AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or HF_TOKEN, in the "
    "environment, on a cluster by a Secret"
)


def secret_places(values: object, path: str = "") -> list[tuple[str, str]]:
    """Where a tree of settings holds what looks like a secret.

    Args:
        values: Nested dicts and lists of plain values.
        path: Dotted path of `values` itself.

    Returns:
        Dotted path and what is wrong there, without the secret.
    """
    if isinstance(values, dict):
        parts = [(f"{path}.{key}".lstrip("."), value) for key, value in values.items()]
    elif isinstance(values, list | tuple):
        parts = [(f"{path}.{number}".lstrip("."), value) for number, value in enumerate(values)]
    elif isinstance(values, str):
        kinds = [kind for pattern, kind in PATTERNS if pattern.search(values)]
        return [(path, f"holds {kinds[0]}; {ADVICE}")] if kinds else []
    else:
        return []
    return [found for place, value in parts for found in secret_places(value, place)]
