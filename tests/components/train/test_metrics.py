"""metrics: every finite number of a step has a name."""

from __future__ import annotations

from components.train.metrics import PHASES, metrics_of
from dinov2_core.training.schedules import StepSchedule
from dinov2_core.training.step_report import GuardReport, StepReport

NAMES = (
    "total", "dino_local", "dino_global", "ibot", "koleo", "teacher_entropy", "prototype_usage",
)  # fmt: skip


def report(*, total: float = 1.0) -> StepReport:
    return StepReport(
        step=3,
        losses={name: float(i) for i, name in enumerate(NAMES)} | {"total": total},
        gradient_norms={"backbone": 1.0},
        schedule=StepSchedule(
            learning_rate=0.1,
            prototype_learning_rate=0.0,
            weight_decay=0.04,
            teacher_momentum=0.99,
            teacher_temperature=0.05,
        ),
        images_per_second=10.0,
        seconds=0.8,
        data_seconds=0.1,
        phase_seconds=dict.fromkeys(PHASES, 0.1),
        guards=GuardReport(
            is_skipped=False, num_skipped=2, num_rollbacks=1, learning_rate_factor=0.5
        ),
        writes_checkpoint=False,
    )


def test_every_number_of_a_step_has_a_name() -> None:
    metrics = metrics_of(report())
    assert len(metrics) == 5 + 4 + 1 + 2 + 3 + 6 + 3
    assert metrics["loss/total"] == 1.0
    assert metrics["gradient_norm/backbone"] == 1.0
    assert metrics["schedule/learning_rate"] == 0.1
    assert metrics["time/backward"] == 0.1
    assert metrics["guards/skipped_steps"] == 2.0


def test_values_that_are_not_finite_are_left_out() -> None:
    metrics = metrics_of(report(total=float("nan")))
    assert "loss/total" not in metrics
    assert metrics["loss/koleo"] == 4.0
