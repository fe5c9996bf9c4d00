"""MLflow runs: one parent per pipeline run, one nested run per stage, metrics without gaps."""

from __future__ import annotations

import os
import platform
import subprocess
import tempfile
import time
from collections.abc import MutableMapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal
from urllib.parse import unquote, urlsplit

import mlflow
import psutil
import requests
from mlflow.data.dataset_source_registry import resolve_dataset_source
from mlflow.data.meta_dataset import MetaDataset
from mlflow.entities import DatasetInput, InputTag, Metric, Param, RunTag
from mlflow.exceptions import MlflowException

from components.runtime.context import RunContext

RUN_TAG = "dinopipe.run_id"
STAGE_TAG = "dinopipe.stage"
KEY_TAG = "dinopipe.stage_key"
STATUS_TAG = "dinopipe.status"
TRACKED_PACKAGES = ("dinopipe", "torch", "mlflow", "numpy", "faiss-cpu", "timm", "kfp")
BATCH = 900
"""Metrics in one request; the server takes at most 1000."""

Status = Literal["FINISHED", "FAILED", "KILLED"]


class TrackingUnreachable(ValueError):
    """The tracking server does not answer; the message says what to check."""


TRACKING_ERRORS = (TrackingUnreachable, MlflowException, requests.RequestException)
"""What talking to a server that has died may raise."""


def check_reachable(uri: str, *, timeout_seconds: float = 3.0) -> None:
    """Ask a tracking server for a sign of life, so that a run fails before work is done.

    Raises:
        TrackingUnreachable: No answer within the time, or an answer that is not a healthy one.
    """
    if urlsplit(uri).scheme not in ("http", "https"):
        return
    advice = (
        "check tracking.uri, start the server (mlflow server --port 5000), or leave tracking.uri "
        "empty for a store in the work directory"
    )
    try:
        answer = requests.get(uri.rstrip("/") + "/health", timeout=timeout_seconds)
    except requests.RequestException as error:
        reason = type(error).__name__
        raise TrackingUnreachable(
            f"tracking server {_without_password(uri)} does not answer ({reason}); {advice}"
        ) from error
    if answer.status_code >= 400:
        raise TrackingUnreachable(
            f"tracking server {_without_password(uri)} answers HTTP {answer.status_code} to "
            f"/health; {advice}"
        )


def _without_password(uri: str) -> str:
    parts = urlsplit(uri)
    if parts.username is None and parts.password is None:
        return uri
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()


def join_injected_run(context: RunContext, environment: MutableMapping[str, str]) -> RunContext:
    """The context with the MLflow run that Kubeflow's plugin opened for this task, if it did.

    Args:
        context: Of the pipeline run.
        environment: Variables of the container; a password in the address moves into the
            variables that MLflow reads, because the context is written to files.
    """
    run_id, uri = environment.get("MLFLOW_RUN_ID", ""), environment.get("MLFLOW_TRACKING_URI", "")
    if not run_id or not uri:
        return context
    parts = urlsplit(uri)
    if parts.username is not None or parts.password is not None:
        environment.setdefault("MLFLOW_TRACKING_USERNAME", unquote(parts.username or ""))
        environment.setdefault("MLFLOW_TRACKING_PASSWORD", unquote(parts.password or ""))
    return context.model_copy(
        update={
            "tracking_uri": _without_password(uri),
            "joined_run": run_id,
            "joined_experiment": environment.get("MLFLOW_EXPERIMENT_ID", ""),
        }
    )


def system_facts() -> dict[str, str]:
    """What a result may depend on: versions, machine, commit."""
    facts = {f"version.{name}": package_version(name) for name in TRACKED_PACKAGES}
    facts["version.python"] = platform.python_version()
    facts["system.platform"] = platform.platform()
    facts["system.cpus"] = str(len(os.sched_getaffinity(0)))
    facts["system.memory_gib"] = f"{psutil.virtual_memory().total / 2**30:.1f}"
    commit = os.environ.get("DINOPIPE_GIT_COMMIT") or _git_commit()
    if commit:
        facts["mlflow.source.git.commit"] = commit
    return facts


def package_version(package: str) -> str:
    """Installed version of a distribution; `absent` without it."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"


def _git_commit() -> str:
    try:
        answer = subprocess.run(
            ["git", "rev-parse", "HEAD"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=False,
        )
    except OSError:  # no git here
        return ""
    return answer.stdout.strip() if answer.returncode == 0 else ""


@dataclass(slots=True)
class StageRun:
    """The MLflow run of one stage."""

    client: mlflow.MlflowClient
    run_id: str
    tracking_uri: str
    experiment_id: str
    is_joined: bool = False
    """Whether the cluster opened it and will close it."""

    def log_params(self, values: dict[str, object], *, prefix: str = "") -> None:
        """Log settings, nested ones with dotted names; those already there stay."""
        known = self.client.get_run(self.run_id).data.params
        flat = {prefix + key: str(value)[:6000] for key, value in _flattened(values).items()}
        new = [Param(key, value) for key, value in flat.items() if key not in known]
        for start in range(0, len(new), 100):
            self.client.log_batch(self.run_id, params=new[start : start + 100])

    def log_metrics(self, values: dict[str, float], *, step: int = 0) -> None:
        """Log numbers of one step."""
        self.log_rows([(step, values)])

    def log_results(self, values: dict[str, float]) -> None:
        """Log numbers of the whole stage; those with a history of steps have their last value."""
        known = self.client.get_run(self.run_id).data.metrics
        self.log_metrics({name: value for name, value in values.items() if name not in known})

    def log_rows(self, rows: list[tuple[int, dict[str, float]]]) -> None:
        """Log numbers of many steps with few requests."""
        now = int(time.time() * 1000)
        metrics = [Metric(k, float(v), now, step) for step, row in rows for k, v in row.items()]
        for start in range(0, len(metrics), BATCH):
            self.client.log_batch(self.run_id, metrics=metrics[start : start + BATCH])

    def set_tags(self, values: dict[str, str]) -> None:
        """Set tags, overwriting."""
        self.client.log_batch(self.run_id, tags=[RunTag(k, v[:5000]) for k, v in values.items()])

    def log_picture(self, name: str, png: bytes) -> None:
        """Log a PNG under `figures/`."""
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory) / name
            path.write_bytes(png)
            self.client.log_artifact(self.run_id, str(path), "figures")

    def log_file(self, path: Path, *, folder: str) -> None:
        """Log a file under a folder of the run's artifacts; empty is their root."""
        self.client.log_artifact(self.run_id, str(path), folder or None)

    def log_text(self, name: str, text: str) -> None:
        """Log a small text artifact."""
        self.client.log_text(self.run_id, text, name)

    def log_dataset(self, *, name: str, uri: str, digest: str, context: str) -> None:
        """Log a data set by reference: where it lies and its digest."""
        source = resolve_dataset_source(uri)
        dataset = MetaDataset(source=source, name=name, digest=digest[:32])  # type: ignore[abstract]
        entity = dataset._to_mlflow_entity()
        self.client.log_inputs(
            self.run_id,
            datasets=[DatasetInput(entity, tags=[InputTag("mlflow.data.context", context)])],
        )

    def last_step(self, metric: str) -> int:
        """Highest step at which a metric was logged; -1 if never."""
        history = self.client.get_metric_history(self.run_id, metric)
        return max((point.step for point in history), default=-1)

    def end(self, status: Status) -> None:
        """Close the run; one that was joined only learns how the stage ended."""
        if self.is_joined:
            self.set_tags({STATUS_TAG: status})
        else:
            self.client.set_terminated(self.run_id, status)

    def keep_open(self) -> None:
        """Open a joined run again after MLflow's own interface has closed it."""
        if self.is_joined:
            self.client.update_run(self.run_id, status="RUNNING")


def _flattened(values: dict[str, object], prefix: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat.update(_flattened(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat


@dataclass(slots=True)
class Tracker:
    """Runs of one pipeline run on one tracking server or store."""

    context: RunContext
    client: mlflow.MlflowClient = field(init=False)
    experiment_id: str = field(init=False)

    def __post_init__(self) -> None:
        """Connect, and make the experiment if it is new.

        Raises:
            TrackingUnreachable: The server does not answer.
        """
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        uri = self.context.resolved_tracking_uri
        check_reachable(uri)
        self.client = mlflow.MlflowClient(tracking_uri=uri, registry_uri=uri)
        self.experiment_id = self.context.joined_experiment or self._experiment()

    def _experiment(self) -> str:
        name = self.context.experiment
        found = self.client.get_experiment_by_name(name)
        if found is not None:
            return str(found.experiment_id)
        embedded = not self.context.tracking_uri
        location = (self.context.root / "mlartifacts").as_uri() if embedded else None
        try:
            return str(self.client.create_experiment(name, artifact_location=location))
        except MlflowException:  # somebody made it in the meantime
            found = self.client.get_experiment_by_name(name)
            if found is None:
                raise
            return str(found.experiment_id)

    def parent(self) -> str:
        """Id of the run that stands for the whole pipeline run; made if new, else reopened."""
        found = self._find(
            f"tags.`{RUN_TAG}` = '{self.context.run_id}' and tags.`{STAGE_TAG}` = 'pipeline'"
        )
        if found:
            self.client.update_run(found, status="RUNNING")
            return found
        tags = {
            RUN_TAG: self.context.run_id,
            STAGE_TAG: "pipeline",
            "dinopipe.spec_sha256": self.context.spec_sha256,
            "mlflow.source.name": "dinopipe",
            **system_facts(),
        }
        run = self.client.create_run(self.experiment_id, tags=tags, run_name=self.context.run_name)
        return str(run.info.run_id)

    def stage(self, stage: str, *, key: str) -> StageRun:
        """The run of a stage: one that the cluster opened, else a nested one of our own.

        The same stage of the same run continues its own.

        Raises:
            ValueError: The run that the cluster names does not exist.
        """
        if self.context.joined_run:
            return self._join(stage, key=key)
        parent = self.parent()
        run_id = self._find(
            f"tags.`{RUN_TAG}` = '{self.context.run_id}' and tags.`{KEY_TAG}` = '{stage}-{key}'"
        )
        if run_id:
            self.client.update_run(run_id, status="RUNNING")
        else:
            tags = {
                RUN_TAG: self.context.run_id,
                STAGE_TAG: stage,
                KEY_TAG: f"{stage}-{key}",
                "mlflow.parentRunId": parent,
                "mlflow.source.name": f"components.{stage}",
                **system_facts(),
            }
            run = self.client.create_run(self.experiment_id, tags=tags, run_name=stage)
            run_id = str(run.info.run_id)
        return self.open(run_id)

    def _join(self, stage: str, *, key: str) -> StageRun:
        run = self.open(self.context.joined_run)
        tags = {RUN_TAG: self.context.run_id, STAGE_TAG: stage, KEY_TAG: f"{stage}-{key}"}
        try:
            run.set_tags({**tags, **system_facts()})
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            raise ValueError(
                f"MLFLOW_RUN_ID {run.run_id} is not in {self.context.tracking_uri}; it is set by "
                "Kubeflow's MLflow plugin: check plugins.mlflow in its configuration"
            ) from error
        return run

    def open(self, run_id: str) -> StageRun:
        """A run whose id is known."""
        return StageRun(
            client=self.client,
            run_id=run_id,
            tracking_uri=self.context.resolved_tracking_uri,
            experiment_id=self.experiment_id,
            is_joined=run_id == self.context.joined_run,
        )

    def end_parent(self, status: Status) -> str:
        """Close the pipeline's run and give its id."""
        run_id = self.parent()
        self.client.set_terminated(run_id, status)
        return run_id

    def _find(self, condition: str) -> str:
        runs = self.client.search_runs([self.experiment_id], condition, max_results=1)
        return str(runs[0].info.run_id) if runs else ""
