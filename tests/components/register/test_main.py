from __future__ import annotations

import pytest

from components.register.config import Gate
from components.register.main import decide
from components.runtime.manifests import EvaluationReport
from components.runtime.registry import (
    EVALUATION_TAG,
    METRIC_TAG,
    VALUE_TAG,
    RegisteredVersion,
)
from dinov2_core.errors import SettingsError

METRIC = "set/knn_top1"
SETS = "e" * 64


def report(value: float, *, untrained: float = 0.2) -> EvaluationReport:
    return EvaluationReport(
        uri="/r",
        sha256="0",
        config_sha256="0",
        metrics={METRIC: value, f"{METRIC}_untrained": untrained},
        evaluation_sha256=SETS,
        pictures=(),
    )


def champion(value: float, *, sets: str = SETS) -> RegisteredVersion:
    tags = {METRIC_TAG: METRIC, VALUE_TAG: repr(value), EVALUATION_TAG: sets}
    return RegisteredVersion(version=4, tags=tags)


@pytest.mark.parametrize(
    ("value", "old", "gain", "is_champion"),
    [(0.8, 0.7, 0.0, True), (0.7, 0.7, 0.0, True), (0.7, 0.7, 0.01, False), (0.6, 0.7, 0.0, False)],
)
def test_the_gain_decides(value: float, old: float, gain: float, is_champion: bool) -> None:
    gate = Gate(metric=METRIC, minimum_gain=gain)
    decision = decide(gate, report=report(value), champion=champion(old))
    assert decision.is_champion == is_champion
    assert f"{value - old:+.4f} from the champion (version 4)" in decision.sentence


def test_the_first_that_beats_its_untrained_self_is_champion() -> None:
    gate = Gate(metric=METRIC)
    assert decide(gate, report=report(0.5), champion=None).is_champion
    worse = decide(gate, report=report(0.1), champion=None)
    assert not worse.is_champion
    assert "does not beat the same architecture untrained (0.2000)" in worse.sentence


def test_other_evaluation_sets_are_not_compared() -> None:
    decision = decide(
        Gate(metric=METRIC), report=report(0.9), champion=champion(0.1, sets="f" * 64)
    )
    assert not decision.is_champion
    assert "was not measured with it on the same sets" in decision.sentence


def test_without_a_gate_all_pass_and_a_wrong_metric_is_refused() -> None:
    assert decide(None, report=report(0.1), champion=champion(0.9)).is_champion
    with pytest.raises(SettingsError, match="set registry.gate.metric to one of"):
        decide(Gate(metric="other"), report=report(0.1), champion=None)
