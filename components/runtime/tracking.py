"""MLflow runs: one parent per pipeline run, one nested run per stage, metrics without gaps."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal, TypeVar
from urllib.parse import unquote, urlsplit

import mlflow
from mlflow.data.dataset_source_registry import resolve_dataset_source
from mlflow.data.meta_dataset import MetaDataset
from mlflow.entities import DatasetInput, InputTag, Metric, Param, RunTag
from mlflow.exceptions import MlflowException

from components.runtime.context import RunContext
from components.runtime.mlflow_requests import ask_mlflow, connected_client, is_absent
from components.runtime.system_facts import system_facts
from components.runtime.uris import without_password
from dinov2_core.errors import InputError, TrackingRefused

RUN_TAG = "dinopipe.run_id"
STAGE_TAG = "dinopipe.stage"
KEY_TAG = "dinopipe.stage_key"
STATUS_TAG = "dinopipe.status"

Status = Literal["FINISHED", "FAILED", "KILLED"]
_T = TypeVar("_T")


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
            "tracking_uri": without_password(uri),
            "joined_run": run_id,
            "joined_experiment": environment.get("MLFLOW_EXPERIMENT_ID", ""),
        }
    )


@dataclass(slots=True)
class StageRun:
    """The MLflow run of one stage; its methods raise what `ask_mlflow` raises."""

    client: mlflow.MlflowClient
    run_id: str
    tracking_uri: str
    experiment_id: str
    is_joined: bool = False
    """Whether the cluster opened it and will close it."""

    def log_params(self, values: dict[str, object]) -> None:
        """Log settings, nested ones with dotted names; those already there stay."""
        known = self._ask(lambda: self.client.get_run(self.run_id).data.params)
        flat = {key: str(value)[:6000] for key, value in _flattened(values).items()}
        new = [Param(key, value) for key, value in flat.items() if key not in known]
        for start in range(0, len(new), 100):
            chunk = new[start : start + 100]
            self._ask(partial(self.client.log_batch, self.run_id, params=chunk))

    def log_metrics(self, values: dict[str, float], *, step: int = 0) -> None:
        """Log numbers of one step, at most 1000."""
        now = int(time.time() * 1000)
        metrics = [Metric(name, float(value), now, step) for name, value in values.items()]
        self._ask(lambda: self.client.log_batch(self.run_id, metrics=metrics))

    def log_results(self, values: dict[str, float]) -> None:
        """Log numbers of the whole stage; those with a history of steps have their last value."""
        known = self._ask(lambda: self.client.get_run(self.run_id)).data.metrics
        self.log_metrics({name: value for name, value in values.items() if name not in known})

    def set_tags(self, values: dict[str, str]) -> None:
        """Set tags, overwriting."""
        tags = [RunTag(k, v[:5000]) for k, v in values.items()]
        self._ask(lambda: self.client.log_batch(self.run_id, tags=tags))

    def log_picture(self, name: str, png: bytes) -> None:
        """Log a PNG under `figures/`."""
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory) / name
            path.write_bytes(png)
            self.log_file(path, folder="figures")

    def log_file(self, path: Path, *, folder: str) -> None:
        """Log a file under a folder of the run's artifacts; empty is their root."""
        self._ask(lambda: self.client.log_artifact(self.run_id, str(path), folder or None))

    def log_text(self, name: str, text: str) -> None:
        """Log a small text artifact."""
        self._ask(lambda: self.client.log_text(self.run_id, text, name))

    def log_dataset(self, *, name: str, uri: str, digest: str, context: str) -> None:
        """Log a data set by reference: its URI and its digest."""
        source = resolve_dataset_source(uri)
        dataset = MetaDataset(source=source, name=name, digest=digest[:32])  # type: ignore[abstract]
        tags = [InputTag("mlflow.data.context", context)]
        inputs = [DatasetInput(dataset._to_mlflow_entity(), tags=tags)]
        self._ask(lambda: self.client.log_inputs(self.run_id, datasets=inputs))

    def last_step(self, metric: str) -> int:
        """Highest step at which a metric was logged; -1 if never."""
        history = self._ask(lambda: self.client.get_metric_history(self.run_id, metric))
        return max((point.step for point in history), default=-1)

    def end(self, status: Status) -> None:
        """Close the run; one that was joined gets the status as a tag."""
        if self.is_joined:
            self.set_tags({STATUS_TAG: status})
        else:
            self._ask(lambda: self.client.set_terminated(self.run_id, status))

    def keep_open(self) -> None:
        """Open a joined run again after MLflow's own interface has closed it."""
        if self.is_joined:
            self._ask(lambda: self.client.update_run(self.run_id, status="RUNNING"))

    def _ask(self, call: Callable[[], _T]) -> _T:
        return ask_mlflow(call, uri=self.tracking_uri)


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
            TrackingUnavailable, TrackingRefused: The server does not answer, or refuses; so for
                all methods.
        """
        self.client = connected_client(self.context.resolved_tracking_uri)
        self.experiment_id = self.context.joined_experiment or self._ask(self._experiment)

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
        tags = {
            RUN_TAG: self.context.run_id,
            STAGE_TAG: "pipeline",
            "dinopipe.spec_sha256": self.context.spec_sha256,
            "mlflow.source.name": "dinopipe",
        }
        return self._opened((RUN_TAG, STAGE_TAG), tags=tags, name=self.context.run_name)

    def stage(self, stage: str, *, key: str) -> StageRun:
        """The run of a stage: one that the cluster opened, else a nested one of our own.

        The same stage of the same run continues its own.

        Raises:
            InputError: The run that the cluster names does not exist.
        """
        if self.context.joined_run:
            return self._join(stage, key=key)
        tags = {
            RUN_TAG: self.context.run_id,
            STAGE_TAG: stage,
            KEY_TAG: f"{stage}-{key}",
            "mlflow.parentRunId": self.parent(),
            "mlflow.source.name": f"components.{stage}",
        }
        return self.open(self._opened((RUN_TAG, KEY_TAG), tags=tags, name=stage))

    def _join(self, stage: str, *, key: str) -> StageRun:
        run = self.open(self.context.joined_run)
        tags = {RUN_TAG: self.context.run_id, STAGE_TAG: stage, KEY_TAG: f"{stage}-{key}"}
        try:
            run.set_tags({**tags, **system_facts()})
        except TrackingRefused as error:
            if not is_absent(error):
                raise
            raise InputError(
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
        """Close the pipeline's run, and those of stages that were killed first; gives its id."""
        run_id = self.parent()
        is_open = f"tags.`mlflow.parentRunId` = '{run_id}' and attributes.status = 'RUNNING'"
        for run in self._ask(lambda: self.client.search_runs([self.experiment_id], is_open)):
            self.open(str(run.info.run_id)).end(status)
        self._ask(lambda: self.client.set_terminated(run_id, status))
        return run_id

    def _opened(self, identity: tuple[str, ...], *, tags: dict[str, str], name: str) -> str:
        """Id of the run whose tags of these names are the given ones; made if there is none.

        It is looked for at every attempt: one that was made may have lost its answer.
        """
        condition = " and ".join(f"tags.`{tag}` = '{tags[tag]}'" for tag in identity)

        def find_or_create() -> str:
            found = self.client.search_runs([self.experiment_id], condition, max_results=1)
            if found:
                self.client.update_run(found[0].info.run_id, status="RUNNING")
                return str(found[0].info.run_id)
            everything = {**tags, **system_facts()}
            run = self.client.create_run(self.experiment_id, tags=everything, run_name=name)
            return str(run.info.run_id)

        return self._ask(find_or_create)

    def _ask(self, call: Callable[[], _T]) -> _T:
        return ask_mlflow(call, uri=self.context.resolved_tracking_uri)
