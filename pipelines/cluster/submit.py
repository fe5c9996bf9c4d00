"""From a spec to a run on a cluster: version by digest, experiment, run."""

from __future__ import annotations

import hashlib
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import kfp
import kfp_server_api
import yaml

from components.runtime.context import RunContext
from components.runtime.manifests import digest_of
from dinov2_core.errors import PipelinesRefused, SettingsError
from k8s.launchers import Processes
from k8s.placement import Volume
from pipelines.cluster.client import address_of, client_output_hidden, with_retries
from pipelines.graph.dinov2 import compile_pipeline
from pipelines.spec.pipeline_spec import PipelineSpec
from pipelines.spec.problems import Problem, SpecError

CONFLICT = 409
EQUALS = 1
PAGE = 100
DEFAULT_WORKDIR = "/mnt/dinopipe"
DEFAULT_CLAIM = "dinopipe-work"
LAUNCHER_ACCOUNT = "dinopipe-launcher"


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Work directory, volume and account of a run on a cluster."""

    workdir: str
    """Path on the shared volume, or s3:// URI, that everything is written to."""
    volume: Volume | None = None
    """Shared volume that all pods mount; None where the work directory needs none."""
    service_account: str = ""
    """Of the run's pods; empty takes the installation's default."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Version:
    """A pipeline version on the server, named by the digest of what was compiled."""

    pipeline_id: str
    version_id: str
    name: str
    is_new: bool
    """False if the server had it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Submission:
    """A run that was started."""

    run_id: str
    address: str
    """Of its page in the user interface."""
    version: Version


def target_of(
    spec: PipelineSpec, *, workdir: str = "", claim: str = "", service_account: str = ""
) -> Target:
    """Work directory, volume and account of a run: as given, else as the spec's placement says.

    Args:
        spec: Checked spec.
        workdir: Path or s3:// URI; empty is the mount path of the volume.
        claim: Volume claim to mount at `workdir`, in place of the placement's volume.
        service_account: Of the pods; empty takes the installation's default, or, where trainings
            get pods of their own, the account of k8s/base that may create TrainJobs.

    Raises:
        SettingsError: The work directory is outside the volume and would be lost with the pod.
    """
    volume = spec.placement.volume
    workdir = workdir or (volume.mount_path if volume else DEFAULT_WORKDIR)
    is_path = "://" not in workdir
    if is_path and (claim or volume is None):
        volume = Volume(claim=claim or DEFAULT_CLAIM, mount_path=workdir)
    if volume is not None and is_path and not Path(workdir).is_relative_to(volume.mount_path):
        raise SettingsError(
            f"work directory {workdir} is not on the volume that is mounted at "
            f"{volume.mount_path} (placement.volume) and would be lost with each pod; choose one "
            "below it, or another volume with --claim"
        )
    if not service_account and not isinstance(spec.placement.launcher, Processes):
        service_account = LAUNCHER_ACCOUNT
    return Target(workdir=workdir, volume=volume, service_account=service_account)


def cluster_context(spec: PipelineSpec, *, workdir: str, use_cache: bool = True) -> RunContext:
    """Context of the stages of a run on a cluster; Kubeflow sets the run's id."""
    return RunContext(
        workdir=workdir,
        run_name=spec.name,
        tracking_uri=spec.tracking.uri,
        experiment=spec.tracking.experiment,
        use_cache=use_cache and spec.use_cache,
        spec_sha256=digest_of(spec),
    )


def submit(
    client: kfp.Client,
    spec: PipelineSpec,
    target: Target,
    *,
    use_cache: bool = True,
) -> Submission:
    """Start a run of a spec.

    Args:
        client: Any client, such as `kfp.Client(host=...)`.
        spec: Checked spec.
        target: Work directory, volume and account.
        use_cache: False does finished stages again, whatever the spec says.

    Raises:
        SpecError: The spec names paths that pods cannot see.
        PipelinesRefused: The server refuses it.
        PipelinesUnavailable: The server fails or does not answer.
    """
    with_retries(client)
    check_fits_cluster(client, spec, target)
    context = cluster_context(spec, workdir=target.workdir, use_cache=use_cache)
    version = publish(client, spec, target)
    experiment = experiment_id(client, spec.tracking.experiment)
    with client_output_hidden():
        # The client drops enable_caching where a version is given, so the stages' own cache is
        # controlled by the parameter; Kubeflow's was switched off when the pipeline was compiled.
        run = client.run_pipeline(
            experiment_id=experiment,
            job_name=f"{spec.name} {version.name[:19]}",
            params={"context": context.model_dump_json()},
            pipeline_id=version.pipeline_id,
            version_id=version.version_id,
            service_account=target.service_account or None,
        )
    address = address_of(client, f"runs/details/{run.run_id}")
    return Submission(run_id=run.run_id, address=address, version=version)


def check_fits_cluster(client: kfp.Client, spec: PipelineSpec, target: Target) -> None:
    """Check that the spec reads nothing of this machine only, and that its pods find each other.

    Raises:
        SpecError: The error lists every problem.
    """
    mount = target.volume.mount_path if target.volume else None
    shared = f", or put it on the shared volume below {mount}" if mount else ""
    message = (
        f"lies on this machine, where no pod sees it; upload it and write its s3:// URI{shared}"
    )
    problems = [
        Problem(path=key, value=path, message=message)
        for key, path in spec.local_paths.items()
        if Path(path).exists() and not (mount and Path(path).is_relative_to(mount))
    ]
    if "://" in target.workdir and not spec.tracking.uri:
        message = (
            f"is empty, and with the work directory {target.workdir} every pod would have an "
            "MLflow store of its own; name a server"
        )
        problems.append(Problem(path="tracking.uri", value="", message=message))
    namespace, wanted = client.get_user_namespace(), spec.placement.namespace
    if namespace and namespace != wanted and not isinstance(spec.placement.launcher, Processes):
        message = (
            f"is not the namespace that the run goes to ({namespace}, --namespace), and a step "
            "cannot own a training elsewhere; make them equal"
        )
        problems.append(Problem(path="placement.namespace", value=wanted, message=message))
    if problems:
        raise SpecError(problems)


def compile_for(spec: PipelineSpec, target: Target, *, path: Path) -> None:
    """Write the pipeline of a spec for a cluster."""
    context = cluster_context(spec, workdir=target.workdir).model_dump_json()
    compile_pipeline(spec, context=context, path=path, volume=target.volume)


def publish(client: kfp.Client, spec: PipelineSpec, target: Target) -> Version:
    """The version of the compiled spec on the server; uploaded if it is not there.

    Raises:
        PipelinesRefused, PipelinesUnavailable: As for `submit`.
    """
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder) / "pipeline.yaml"
        compile_for(spec, target, path=package)
        content = package.read_bytes()
        pipeline = _pipeline_id(client, _pipeline_name(content))
        name = f"sha256-{hashlib.sha256(content).hexdigest()[:32]}"
        known = _version_id(client, pipeline, name)
        if known:
            return Version(pipeline_id=pipeline, version_id=known, name=name, is_new=False)
        try:
            with client_output_hidden():
                made = client.upload_pipeline_version(
                    str(package), pipeline_version_name=name, pipeline_id=pipeline
                )
        except PipelinesRefused as error:
            known = _version_id(client, pipeline, name) if error.status == CONFLICT else ""
            if not known:
                raise
            return Version(pipeline_id=pipeline, version_id=known, name=name, is_new=False)
    return Version(
        pipeline_id=pipeline, version_id=made.pipeline_version_id, name=name, is_new=True
    )


def _pipeline_name(content: bytes) -> str:
    document = next(yaml.safe_load_all(content))
    return str(document["pipelineInfo"]["name"])


def _pipeline_id(client: kfp.Client, name: str) -> str:
    """Id of the pipeline; an empty one is created if there is none."""
    namespace = client.get_user_namespace() or None
    known = _pipeline_named(client, name, namespace)
    if known:
        return known
    try:
        made = client.pipelines.pipeline_service_create_pipeline(
            kfp_server_api.V2beta1Pipeline(
                name=name,
                display_name=name,
                namespace=namespace,
                description="Curates images, trains a DINOv2 backbone, evaluates and registers it.",
            )
        )
    except PipelinesRefused as error:
        known = _pipeline_named(client, name, namespace) if error.status == CONFLICT else ""
        if not known:
            raise
        return known
    return str(made.pipeline_id)


def _pipeline_named(client: kfp.Client, name: str, namespace: str | None) -> str:
    found = client.list_pipelines(
        namespace=namespace, filter=display_name_filter(name), page_size=PAGE
    )
    ids = [item.pipeline_id for item in found.pipelines or () if item.display_name == name]
    return str(ids[0]) if ids else ""


def _version_id(client: kfp.Client, pipeline: str, name: str) -> str:
    found = client.list_pipeline_versions(
        pipeline, filter=display_name_filter(name), page_size=PAGE
    )
    versions = found.pipeline_versions or ()
    ids = [item.pipeline_version_id for item in versions if item.display_name == name]
    return str(ids[0]) if ids else ""


def experiment_id(client: kfp.Client, name: str) -> str:
    """Id of the experiment with this name; created if there is none.

    Raises:
        PipelinesRefused, PipelinesUnavailable: As for `submit`.
    """
    namespace = client.get_user_namespace() or None
    with client_output_hidden():
        try:
            experiment: Any = client.create_experiment(name, namespace=namespace)
        except PipelinesRefused as error:
            if error.status != CONFLICT:  # else somebody created it in the meantime
                raise
            experiment = client.get_experiment(experiment_name=name, namespace=namespace)
    return str(experiment.experiment_id)


def display_name_filter(name: str) -> str:
    """The server's filter for objects with this display name."""
    predicate = {"operation": EQUALS, "key": "display_name", "stringValue": name}
    return json.dumps({"predicates": [predicate]})
