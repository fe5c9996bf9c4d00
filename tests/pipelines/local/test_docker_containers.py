from __future__ import annotations

from pathlib import Path

import pytest

from dinov2_core.errors import SettingsError
from pipelines.local.docker_containers import DockerContainers
from pipelines.spec.pipeline_spec import load_spec
from tests.pipelines.specs import small_values, write_spec


def test_without_an_engine_the_runner_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DOCKER_HOST", "unix:///no/such/socket")
    spec = load_spec(write_spec(small_values("s3://bucket/pile"), tmp_path / "spec.yaml"))
    with pytest.raises(SettingsError, match="no Docker engine answers .* leave out --runner"):
        DockerContainers(spec, workdir=tmp_path / "work")
