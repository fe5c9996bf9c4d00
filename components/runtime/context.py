"""Where a run takes place: work directory, identity and tracking, the same for all its stages."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from dinov2_core.config import Frozen


class RunContext(Frozen):
    """What all stages of one pipeline run share; no secret belongs here."""

    workdir: str
    """Directory, the same for all stages, that holds everything the run writes."""
    run_id: str = ""
    """Identity of the pipeline run; empty takes the identity that Kubeflow gave it."""
    run_name: str
    """Name that people see."""
    tracking_uri: str = ""
    """MLflow server or store; empty is an SQLite store in the work directory."""
    experiment: str = "dinopipe"
    """MLflow experiment."""
    use_cache: bool = True
    """Whether a finished stage with the same inputs and settings is taken over."""
    spec_sha256: str = Field("", pattern="^([0-9a-f]{64})?$")
    """Digest of the spec that the run was started from."""
    profile_steps: int = Field(0, ge=0)
    """Steps of each training stage that a profiler records; no part of a result's identity."""

    @property
    def root(self) -> Path:
        """The work directory as a path."""
        return Path(self.workdir)

    @property
    def resolved_tracking_uri(self) -> str:
        """The tracking URI with the embedded store filled in."""
        return self.tracking_uri or f"sqlite:///{self.root / 'mlflow.db'}"

    @property
    def progress_directory(self) -> Path:
        """Where stages of this run report their progress."""
        return self.root / "progress" / self.run_id

    def stage_directory(self, stage: str, key: str) -> Path:
        """Where a stage with this identity keeps its outputs."""
        return self.root / "stages" / stage / key[:16]
