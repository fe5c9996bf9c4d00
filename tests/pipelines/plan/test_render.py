from __future__ import annotations

from pathlib import Path

import kfp
import pytest
import yaml

from dinov2_core.errors import InputError
from pipelines.cluster.submit import publish, target_of
from pipelines.plan.kubectl import built_manifests
from pipelines.plan.render import (
    PIPELINE,
    deployed_on,
    differences,
    render,
)
from pipelines.spec.pipeline_spec import PipelineSpec, load_spec
from tests.pipelines.kfp_server import KfpServer
from tests.pipelines.specs import changed, small_values, write_spec

IMAGE = f"registry.example/dinopipe@sha256:{'a' * 64}"


@pytest.fixture
def spec(tmp_path: Path) -> PipelineSpec:
    values = small_values("s3://bucket/pile", placement={"launcher": {"kind": "trainjob"}})
    return load_spec(write_spec({**values, "image": IMAGE}, tmp_path / "spec.yaml"))


def test_the_pipeline_and_a_job_per_training_stage_are_rendered(spec: PipelineSpec) -> None:
    files = render(spec, target_of(spec))
    assert list(files) == ["pipeline.yaml", "pretrain-trainjobs.yaml", "finetune-trainjobs.yaml"]
    job = yaml.safe_load(files["pretrain-trainjobs.yaml"])
    assert job["kind"] == "TrainJob"
    assert job["spec"]["trainer"]["numNodes"] == 1


def test_processes_in_the_stages_pod_need_no_job(tmp_path: Path) -> None:
    spec = load_spec(write_spec(small_values("s3://bucket/pile"), tmp_path / "spec.yaml"))
    assert list(render(spec, target_of(spec))) == ["pipeline.yaml"]


def test_the_same_spec_changes_nothing(spec: PipelineSpec) -> None:
    assert differences(render(spec, target_of(spec)), render(spec, target_of(spec))) == ""


def test_a_changed_setting_is_a_line(tmp_path: Path) -> None:
    values = small_values("s3://bucket/pile")
    other = changed(values, {"pretrain__learning__optimization__num_steps": 24})
    before, after = (
        render(read, target_of(read))["pipeline.yaml"]
        for read in (
            load_spec(write_spec(each, tmp_path / "spec.yaml")) for each in (values, other)
        )
    )
    lines = differences({"p.yaml": before}, {"p.yaml": after}).splitlines()
    steps = [line.replace(" ", "") for line in lines if "num_steps" in line and line[0] in "+-"]
    assert "-num_steps:12" in steps
    assert "+num_steps:24" in steps
    assert len(lines) < 60


def test_an_earlier_file_that_is_no_yaml_is_named() -> None:
    with pytest.raises(InputError, match=r"p\.yaml of the earlier plan is not YAML"):
        differences({"p.yaml": "a: ["}, {"p.yaml": "a: 1"})


def test_new_and_missing_files_are_listed() -> None:
    report = differences({"old.yaml": "a: 1\n"}, {"new.yaml": "a: 1\nb: 2\n"})
    assert report.splitlines() == [
        "new.yaml is new, 2 lines",
        "old.yaml is not there any more, 1 lines",
    ]


def test_manifests_of_an_overlay_are_rendered_as_well(spec: PipelineSpec, kubectl: Path) -> None:
    manifests = built_manifests("prod-gpu")
    assert {"Deployment", "TrainingRuntime", "ClusterQueue"} <= {item["kind"] for item in manifests}
    files = render(spec, target_of(spec), manifests=manifests)
    assert list(yaml.safe_load_all(files["manifests.yaml"])) == manifests


def test_what_is_deployed_is_the_newest_version_on_the_server(
    server: KfpServer, spec: PipelineSpec
) -> None:
    client = kfp.Client(host=server.url, namespace="team")
    assert deployed_on(client, pipeline="dinopipe-demo") == {}
    publish(client, spec, target_of(spec))
    deployed = deployed_on(client, pipeline="dinopipe-demo")
    planned = {PIPELINE: render(spec, target_of(spec))[PIPELINE]}
    assert differences(deployed, planned) == ""
