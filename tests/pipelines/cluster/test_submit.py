from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import kfp
import pytest
import yaml

from dinov2_core.errors import PipelinesRefused, PipelinesUnavailable, SettingsError
from k8s.placement import Volume
from pipelines.cluster.client import RetryPolicy, connect
from pipelines.cluster.submit import (
    Target,
    cluster_context,
    compile_for,
    experiment_id,
    publish,
    submit,
    target_of,
)
from pipelines.spec.pipeline_spec import PipelineSpec, load_spec
from pipelines.spec.problems import SpecError
from tests.pipelines.kfp_server import API, KfpServer
from tests.pipelines.specs import changed, small_values, write_spec

QUICK = RetryPolicy(timeout_seconds=5.0, max_retries=2, backoff_seconds=0.01)
TARGET = Target(
    workdir="/mnt/dinopipe", volume=Volume(claim="dinopipe-work", mount_path="/mnt/dinopipe")
)


def a_spec(folder: Path, **changes: Any) -> PipelineSpec:
    values = changed(small_values("s3://bucket/pile"), changes)
    return load_spec(write_spec(values, folder / "spec.yaml"))


@pytest.fixture
def spec(tmp_path: Path) -> PipelineSpec:
    return a_spec(tmp_path)


@pytest.fixture
def client(server: KfpServer) -> kfp.Client:
    return connect(server.url, retry_policy=QUICK)


def context_of_run(server: KfpServer, run_id: str) -> dict[str, Any]:
    context: dict[str, Any] = json.loads(
        server.runs[run_id]["runtime_config"]["parameters"]["context"]
    )
    return context


def test_a_run_starts_from_a_version_named_by_its_digest(
    server: KfpServer, client: kfp.Client, spec: PipelineSpec, tmp_path: Path
) -> None:
    made = submit(client, spec, TARGET)
    (version,) = server.versions.values()
    (run,) = server.runs.values()
    compile_for(spec, TARGET, path=tmp_path / "pipeline.yaml")
    package = server.packages[version["pipeline_version_id"]]
    assert package == (tmp_path / "pipeline.yaml").read_bytes()
    assert version["display_name"] == made.version.name
    assert made.version.name.startswith("sha256-")
    assert run["pipeline_version_reference"] == {
        "pipeline_id": made.version.pipeline_id,
        "pipeline_version_id": made.version.version_id,
    }
    assert server.experiments[run["experiment_id"]]["display_name"] == "dinopipe"
    assert made.address == f"{server.url}/#/runs/details/{made.run_id}"
    assert [p["display_name"] for p in server.pipelines.values()] == ["dinopipe-demo"]


def test_the_same_spec_twice_is_one_version_and_two_runs(
    server: KfpServer, client: kfp.Client, spec: PipelineSpec
) -> None:
    first, second = (submit(client, spec, TARGET) for _ in range(2))
    assert (first.version.is_new, second.version.is_new) == (True, False)
    assert first.version.version_id == second.version.version_id
    assert first.run_id != second.run_id
    assert len(server.versions) == len(server.pipelines) == len(server.experiments) == 1


def test_a_changed_spec_is_another_version_of_the_same_pipeline(
    server: KfpServer, client: kfp.Client, tmp_path: Path
) -> None:
    first = submit(client, a_spec(tmp_path), TARGET)
    second = submit(client, a_spec(tmp_path, finetune__num_steps=5), TARGET)
    assert first.version.version_id != second.version.version_id
    assert first.version.pipeline_id == second.version.pipeline_id


def test_a_plain_client_does_as_well(server: KfpServer, spec: PipelineSpec) -> None:
    client = kfp.Client(host=server.url, namespace="team")
    server.namespace = "team"
    assert submit(client, spec, TARGET).run_id in server.runs


class TestCache:
    """`enable_caching` does not arrive with a version, so the stages get a parameter."""

    def test_the_spec_and_the_caller_decide(
        self, server: KfpServer, client: kfp.Client, tmp_path: Path
    ) -> None:
        used = {
            (in_spec, asked): context_of_run(
                server,
                submit(client, a_spec(tmp_path, use_cache=in_spec), TARGET, use_cache=asked).run_id,
            )["use_cache"]
            for in_spec in (True, False)
            for asked in (True, False)
        }
        assert used == {
            (True, True): True,
            (True, False): False,
            (False, True): False,
            (False, False): False,
        }

    def test_the_caller_needs_no_version_of_its_own(
        self, server: KfpServer, client: kfp.Client, spec: PipelineSpec
    ) -> None:
        first = submit(client, spec, TARGET)
        second = submit(client, spec, TARGET, use_cache=False)
        assert first.version.version_id == second.version.version_id

    def test_kubeflows_own_cache_is_off_in_what_was_uploaded(
        self, server: KfpServer, client: kfp.Client, spec: PipelineSpec
    ) -> None:
        made = submit(client, spec, TARGET)
        document = next(yaml.safe_load_all(server.packages[made.version.version_id]))
        tasks = document["root"]["dag"]["tasks"].values()
        assert not any(task["cachingOptions"].get("enableCache") for task in tasks)


def test_the_run_learns_where_it_works(
    server: KfpServer, client: kfp.Client, tmp_path: Path
) -> None:
    spec = a_spec(tmp_path, tracking={"uri": "https://mlflow.example"})
    target = Target(workdir="s3://bucket/work", service_account="dinopipe-runner")
    run_id = submit(client, spec, target).run_id
    assert context_of_run(server, run_id)["workdir"] == "s3://bucket/work"
    assert server.runs[run_id]["service_account"] == "dinopipe-runner"


def test_pods_without_a_shared_directory_need_a_tracking_server(
    server: KfpServer, client: kfp.Client, spec: PipelineSpec
) -> None:
    with pytest.raises(
        SpecError, match=r"tracking\.uri: '' is empty, and with .* s3://bucket/work"
    ):
        submit(client, spec, Target(workdir="s3://bucket/work"))
    assert server.asked == []


def test_the_identity_of_the_run_is_left_to_kubeflow(spec: PipelineSpec) -> None:
    context = cluster_context(spec, workdir="/w")
    assert context.run_id == ""
    assert len(context.spec_sha256) == 64


def test_a_namespace_goes_with_every_request(server: KfpServer, spec: PipelineSpec) -> None:
    server.namespace = "team-vision"
    submit(connect(server.url, namespace="team-vision", retry_policy=QUICK), spec, TARGET)
    (pipeline,) = server.pipelines.values()
    (experiment,) = server.experiments.values()
    assert pipeline["namespace"] == experiment["namespace"] == "team-vision"
    with pytest.raises(PipelinesRefused, match="does not allow this .*--namespace"):
        submit(connect(server.url, namespace="other", retry_policy=QUICK), spec, TARGET)


def test_places_of_this_machine_are_refused_before_anything_is_sent(
    server: KfpServer, client: kfp.Client, tmp_path: Path
) -> None:
    (tmp_path / "pile").mkdir()
    spec = a_spec(tmp_path, images={"uri": "pile"})
    with pytest.raises(SpecError, match="lies on this machine, where no pod sees it"):
        submit(client, spec, TARGET)
    assert server.asked == []
    mounted = Volume(claim="dinopipe-work", mount_path=str(tmp_path))
    assert submit(client, spec, Target(workdir=str(tmp_path), volume=mounted)).run_id


@pytest.mark.parametrize("path", ["pipelines", "pipelines/upload_version", "experiments"])
def test_somebody_else_may_make_the_same_at_the_same_time(
    server: KfpServer, client: kfp.Client, spec: PipelineSpec, path: str
) -> None:
    """The other's request is done first, so that ours is answered with 409."""
    server.fail("POST", f"{API}/{path}", 409, is_done=True)
    made = submit(client, spec, TARGET)
    assert made.run_id in server.runs
    assert len(server.versions) == len(server.pipelines) == len(server.experiments) == 1


@pytest.mark.parametrize("path", ["pipelines", "pipelines/upload_version", "experiments"])
@pytest.mark.parametrize("status", [403, 409, 500])
def test_a_failure_is_not_hidden(
    server: KfpServer, client: kfp.Client, spec: PipelineSpec, path: str, status: int
) -> None:
    server.fail("POST", f"{API}/{path}", status)
    errors = (PipelinesRefused, PipelinesUnavailable, ValueError)  # the last is the client's own
    with pytest.raises(errors, match=r"HTTP|No experiment"):
        submit(client, spec, TARGET)
    assert server.runs == {}


def test_a_lost_answer_to_the_start_of_a_run_is_not_repeated(
    server: KfpServer, client: kfp.Client, spec: PipelineSpec
) -> None:
    server.fail("POST", f"{API}/runs", 504, is_done=True)
    with pytest.raises(PipelinesUnavailable, match="may have been carried out all the same"):
        submit(client, spec, TARGET)
    assert len(server.runs) == 1


def test_a_busy_server_is_asked_again(
    server: KfpServer, client: kfp.Client, spec: PipelineSpec
) -> None:
    for path in ("pipelines", "pipelines/upload_version", "experiments", "runs"):
        server.fail("POST", f"{API}/{path}", 429)
    submit(client, spec, TARGET)
    assert len(server.runs) == len(server.versions) == 1


def test_publishing_alone_starts_nothing(
    server: KfpServer, client: kfp.Client, spec: PipelineSpec
) -> None:
    assert publish(client, spec, TARGET).is_new
    assert not publish(client, spec, TARGET).is_new
    assert server.runs == {}


def test_an_experiment_is_found_again(server: KfpServer, client: kfp.Client) -> None:
    assert experiment_id(client, "one") == experiment_id(client, "one")
    assert experiment_id(client, "two") != experiment_id(client, "one")


def test_the_library_prints_nothing_of_its_own(
    client: kfp.Client, spec: PipelineSpec, capsys: pytest.CaptureFixture[str]
) -> None:
    submit(client, spec, TARGET)
    assert capsys.readouterr().out == ""


def test_the_stand_in_refuses_what_the_models_do_not_know(server: KfpServer) -> None:
    """A test of the test: a stand-in that takes everything proves nothing."""
    client = connect(server.url, retry_policy=QUICK)
    api = client._run_api.api_client
    for body, message in (
        ({"display_name": "x", "enable_caching": False}, "unknown keys"),
        ({"display_name": 7.5}, "wanted str"),
        ({"display_name": "x", "state": "DONE"}, "wanted one of"),
    ):
        with pytest.raises(PipelinesRefused, match=message):
            api.call_api(f"{API}/runs", "POST", body=body, header_params={})
    server.pipelines["p"] = {"pipeline_id": "p", "display_name": "p"}


def test_the_stand_in_reads_uploads_as_pipelines(server: KfpServer, tmp_path: Path) -> None:
    server.pipelines["p"] = {"pipeline_id": "p", "display_name": "p"}
    package = tmp_path / "p.yaml"
    package.write_text("schemaVersion: 2.1.0\nbogus: 1\n")
    with pytest.raises(PipelinesRefused, match="not a pipeline"):
        connect(server.url, retry_policy=QUICK).upload_pipeline_version(
            str(package), "v", pipeline_id="p"
        )


class TestTarget:
    def test_it_is_the_placements_volume(self, tmp_path: Path) -> None:
        spec = a_spec(tmp_path, placement={"volume": {"claim": "fast", "mount_path": "/data"}})
        volume = Volume(claim="fast", mount_path="/data")
        assert target_of(spec) == Target(workdir="/data", volume=volume)
        assert target_of(spec, workdir="/data/runs").volume == volume

    def test_else_a_claim_of_a_usual_name(self, spec: PipelineSpec) -> None:
        assert target_of(spec) == TARGET

    def test_a_claim_may_be_given(self, tmp_path: Path) -> None:
        spec = a_spec(tmp_path, placement={"volume": {"claim": "fast", "mount_path": "/data"}})
        target = target_of(spec, workdir="/mine", claim="slow", service_account="runner")
        volume = Volume(claim="slow", mount_path="/mine")
        assert target == Target(workdir="/mine", volume=volume, service_account="runner")

    def test_a_store_needs_no_volume(self, spec: PipelineSpec) -> None:
        assert target_of(spec, workdir="s3://bucket/work").volume is None

    def test_a_work_directory_beside_the_volume_is_refused(self, tmp_path: Path) -> None:
        spec = a_spec(tmp_path, placement={"volume": {"claim": "fast", "mount_path": "/data"}})
        with pytest.raises(SettingsError, match="/scratch is not on the volume"):
            target_of(spec, workdir="/scratch")

    def test_trainings_on_pods_of_their_own_need_an_account_that_may_make_them(
        self, tmp_path: Path
    ) -> None:
        image = "registry.example/dinopipe@sha256:" + "0" * 64
        spec = a_spec(tmp_path, placement={"launcher": {"kind": "trainjob"}}, image=image)
        assert target_of(spec).service_account == "dinopipe-launcher"
        assert target_of(spec, service_account="mine").service_account == "mine"


def test_a_training_in_another_namespace_than_its_step_is_refused(
    server: KfpServer, tmp_path: Path
) -> None:
    image = "registry.example/dinopipe@sha256:" + "0" * 64
    placement = {"launcher": {"kind": "trainjob"}, "namespace": "vision"}
    spec = a_spec(tmp_path, placement=placement, image=image)
    with pytest.raises(SpecError, match="placement.namespace: 'vision' is not the namespace"):
        submit(connect(server.url, namespace="team", retry_policy=QUICK), spec, target_of(spec))
    assert server.asked == []
    server.namespace = "vision"
    client = connect(server.url, namespace="vision", retry_policy=QUICK)
    assert submit(client, spec, target_of(spec)).run_id in server.runs
