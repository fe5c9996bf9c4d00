"""Settings of the registration stage."""

from __future__ import annotations

from pydantic import Field

from dinov2_core.config.frozen import Frozen


class Gate(Frozen):
    """When a new model becomes the champion."""

    metric: str = Field(min_length=1)
    """Metric of the evaluation, such as `fashion_mnist/knn_top1`; higher is better."""
    minimum_gain: float = 0.0
    """How much better than the current champion, in the metric's own unit."""
    beats_untrained: bool = True
    """Whether it must also beat its own architecture untrained."""


class RegisterStage(Frozen):
    """From a teacher and its numbers to a model version under an alias."""

    model_name: str = Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}$")
    """Registered model."""
    gate: Gate | None = None
    """Without a gate every new version becomes the champion."""
    champion_alias: str = Field("champion", pattern=r"^[a-z][a-z0-9_-]{0,49}$")
    """Alias of the model that consumers load."""
    challenger_alias: str = Field("challenger", pattern=r"^[a-z][a-z0-9_-]{0,49}$")
    """Alias of the newest model that did not pass the gate."""
