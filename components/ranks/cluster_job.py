"""The job that ranks run as on a cluster, with the environment and the command of its pods."""

from __future__ import annotations

import logging
import os
from urllib.parse import urlsplit

from components.ranks.job import RanksJob
from components.runtime.manifests import digest_of
from components.runtime.storage import is_remote
from dinov2_core.errors import SettingsError
from k8s.placement import TrainingPods
from k8s.training import Owner, Training

logger = logging.getLogger(__name__)

PASSED_ON = ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_REGION", "AWS_DEFAULT_REGION")
"""Variables of the step's pod that training pods need too; none is secret."""


def own_pod(pods: TrainingPods) -> Owner | None:
    """The pod that this process runs in, which will own the job.

    None outside of a cluster, and in another namespace than the job's: an owner there would have
    the job deleted at once.
    """
    name, uid = os.environ.get("POD_NAME"), os.environ.get("POD_UID")
    here, there = os.environ.get("POD_NAMESPACE"), pods.placement.namespace
    if here and here != there:
        logger.warning(
            "this step runs in namespace %s and its training in %s, where it cannot own it: should "
            "the step be killed without warning, the training runs on to its end or deadline; "
            "placement.namespace %s would keep them together",
            here,
            there,
            here,
        )
        return None
    return Owner(name=name, uid=uid) if name and uid else None


def training_of(job: RanksJob, *, pods: TrainingPods, owner: Owner | None) -> Training:
    """A job's ranks as values of a manifest.

    Raises:
        SettingsError: The tracking server's address holds a password, which a manifest would show,
            or there is no tracking server that the training's pods could reach.
    """
    context, topology = job.context, job.topology
    address = urlsplit(context.resolved_tracking_uri)
    if address.username is not None or address.password is not None:
        raise SettingsError(
            "tracking.uri holds a password or token, which the training's manifest would show; "
            "put it in a Secret and name that under placement.secrets"
        )
    if not context.tracking_uri and is_remote(job.directory):
        raise SettingsError(
            f"pods of a training share {context.workdir}, where no SQLite store can be, with this "
            "step; set tracking.uri to an MLflow server"
        )
    passed = {name: os.environ[name] for name in PASSED_ON if os.environ.get(name)}
    secret = {key for item in pods.placement.secrets for key in item.keys}
    environment = {
        "MLFLOW_EXPERIMENT_NAME": context.experiment,
        "MLFLOW_TRACKING_URI": context.resolved_tracking_uri,
        "OMP_NUM_THREADS": str(topology.threads_per_process),
        **passed,
    }
    content = job.model_dump(mode="json", exclude={"mlflow_run_id": True})
    return Training(
        run_id=context.run_id,
        run_name=context.run_name,
        stage=job.stage_name,
        command=("python3", "-m", "components.ranks.torchrun_entry", job.worker, job.uri),
        num_nodes=topology.num_nodes,
        processes_per_node=topology.processes_per_node,
        environment={name: value for name, value in environment.items() if name not in secret},
        passing_environment={"MLFLOW_RUN_ID": job.mlflow_run_id},
        content_sha256=digest_of(content),
        pods=pods,
        owner=owner,
    )
