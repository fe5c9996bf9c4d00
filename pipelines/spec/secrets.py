"""Passwords and keys that must not be in a spec, because compiled pipelines show them."""

from __future__ import annotations

import re

from pipelines.spec.problems import Problem

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


def find_secrets(values: object, path: str = "") -> list[Problem]:
    """Find what looks like a secret in a tree of settings.

    Args:
        values: Nested dicts and lists of plain values.
        path: Dotted path of `values` itself.

    Returns:
        One problem for each, without the secret.
    """
    if isinstance(values, dict):
        parts = [(f"{path}.{key}".lstrip("."), value) for key, value in values.items()]
    elif isinstance(values, list | tuple):
        parts = [(f"{path}.{number}".lstrip("."), value) for number, value in enumerate(values)]
    elif isinstance(values, str):
        kind = next((kind for pattern, kind in PATTERNS if pattern.search(values)), "")
        return [Problem(path=path, value=None, message=f"holds {kind}; {ADVICE}")] if kind else []
    else:
        return []
    return [found for key, value in parts for found in find_secrets(value, key)]
