"""The context of a pipeline run: work directory, identity and tracking, one for all stages."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from components.runtime.uris import is_remote, join_uri, local_path
from dinov2_core.config.frozen import Frozen


def sqlite_uri(database: Path) -> str:
    """The address of an SQLite file for MLflow, which reads `?` and `%` in it as special."""
    path = str(database)
    escaped = path.replace("%", "%25").replace("?", "%3F")
    # With the name of the driver MLflow makes no directory of the escaped name.
    return f"sqlite:///{path}" if escaped == path else f"sqlite+pysqlite:///{escaped}"


class RunContext(Frozen):
    """What all stages of one pipeline run share; no secret belongs here."""

    workdir: str
    """Directory on a file system that all stages see, or s3://BUCKET/PREFIX: holds everything that
    the run writes."""
    run_id: str = ""
    """Identity of the pipeline run; empty takes the identity that Kubeflow gave it."""
    run_name: str
    """Name that users see."""
    tracking_uri: str = ""
    """MLflow server or store; empty is an SQLite store in the work directory on this node."""
    experiment: str = "dinopipe"
    """MLflow experiment."""
    use_cache: bool = True
    """Whether the result of a finished stage with the same inputs and settings is reused."""
    spec_sha256: str = Field("", pattern="^([0-9a-f]{64})?$")
    """Digest of the spec that the run was started from."""
    joined_run: str = ""
    """MLflow run that the cluster opened for this stage and will close; empty opens our own."""
    joined_experiment: str = ""
    """MLflow experiment of that run."""
    profile_steps: int = Field(0, ge=0)
    """Steps of each training stage that a profiler records; no part of a result's identity."""

    @property
    def root(self) -> Path:
        """The work directory on this node: the directory itself, or that of the cache."""
        return local_path(self.workdir)

    def uri_of(self, path: Path) -> str:
        """Path or URI, for all nodes, of what lies below the work directory on this one."""
        if not is_remote(self.workdir):
            return str(path)
        return join_uri(self.workdir, path.relative_to(self.root).as_posix())

    @property
    def resolved_tracking_uri(self) -> str:
        """The tracking URI with the embedded store filled in."""
        return self.tracking_uri or sqlite_uri(self.root / "mlflow.db")

    @property
    def progress_directory(self) -> Path:
        """Directory of the files in which stages of this run report their progress."""
        return self.root / "progress" / self.run_id

    def stage_directory(self, stage: str, key: str) -> Path:
        """Directory of the outputs of a stage with this identity."""
        return self.root / "stages" / stage / key[:16]
