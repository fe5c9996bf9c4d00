from __future__ import annotations

import json
from pathlib import Path

import pytest
from pydantic import ValidationError

from pipelines.spec.pipeline_spec import PipelineSpec, load_spec
from pipelines.spec.problems import SpecError
from pipelines.spec.secrets import find_secrets
from tests.pipelines.specs import changed, demo_values, small_values, write_spec

SECRETS = [
    "s3://AKIDEXAMPLE:hunter2hunter2@bucket/pile",
    "https://me:hunter2hunter2@host/images",
    "https://hunter2hunter2@host/images",
    "https://bucket.example/pile?X-Amz-Signature=hunter2hunter2",
    "https://bucket.example/pile?a=b&token=hunter2hunter2",
    "s3://AKIAIOSFODNN7EXAMPLE/hunter2hunter2",
    "hf_hunter2hunter2hunter2hunter2hunter2",
    "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3OCJ9.hunter2hunter2",
]


@pytest.mark.parametrize("secret", SECRETS)
def test_each_kind_is_found_and_not_shown(secret: str) -> None:
    (problem,) = find_secrets({"a": [{"b": secret}, 1, None], "c": "s3://bucket/x"})
    assert problem.path == "a.0.b"
    assert "take it out" in problem.message
    assert "hunter2" not in str(problem)


@pytest.mark.parametrize(
    "value",
    [
        "s3://bucket/pile",
        "models:/teacher@champion",
        "registry.example/dinopipe@sha256:" + "0" * 64,
        "https://mlflow.example:5000",
        "/mnt/pile@2026/images",
        "hf_transfer",
        "a user:password in words",
    ],
)
def test_what_is_no_secret_passes(value: str) -> None:
    assert find_secrets([value]) == []


@pytest.mark.parametrize(
    "field",
    [
        "images__uri",
        "image",
        "tracking",
        "registry__model_name",
        "pretrain__initial_weights",
    ],
)
@pytest.mark.parametrize("secret", SECRETS)
def test_no_field_of_a_spec_takes_one(tmp_path: Path, field: str, secret: str) -> None:
    value = {"uri": secret} if field == "tracking" else secret
    spec = write_spec(changed(demo_values(), {field: value}), tmp_path / "spec.yaml")
    with pytest.raises(SpecError) as caught:
        load_spec(spec)
    assert "hunter2" not in str(caught.value)


def test_evaluation_sets_take_none(tmp_path: Path) -> None:
    values = demo_values()
    values["evaluation_sets"][0]["test"] = SECRETS[0]
    with pytest.raises(SpecError, match=r"evaluation_sets.0.test: holds a password or token"):
        load_spec(write_spec(values, tmp_path / "spec.yaml"))


def test_a_spec_made_in_python_takes_none(tmp_path: Path) -> None:
    values = small_values(SECRETS[0])
    with pytest.raises(ValidationError, match=r"images.uri: holds a password or token"):
        PipelineSpec.model_validate_json(json.dumps(values))
