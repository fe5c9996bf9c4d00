import math

import numpy as np
import pytest

from dinov2_core.config.backbone import Backbone
from dinov2_core.config.objectives import DinoObjective, Head, IbotObjective, SharedHead
from dinov2_core.config.training import (
    HeadWarmup,
    HighResolution,
    Optimization,
    Teacher,
    TrainingConfig,
)
from dinov2_core.training.schedules import linear_warmup, schedule_at, warmup_cosine


def make_config(*, optimization: Optimization, teacher: Teacher) -> TrainingConfig:
    return TrainingConfig(
        backbone=Backbone(architecture="vit_tiny"),
        dino=DinoObjective(head=Head()),
        ibot=IbotObjective(head=SharedHead()),
        optimization=optimization,
        teacher=teacher,
    )


def reference_array(
    *, base: float, final: float, total: int, warmup: int = 0, start: float = 0.0
) -> np.ndarray:
    """The whole schedule as an array: linspace, then a cosine over the remaining steps."""
    steps = np.arange(total - warmup)
    cosine = final + 0.5 * (base - final) * (1 + np.cos(np.pi * steps / max(len(steps), 1)))
    return np.concatenate([np.linspace(start, base, warmup), cosine])


# Short run, long run of ViT-L and of ViT-g (arXiv:2304.07193, table 16, and its released recipes).
RECIPES = {
    "short": (
        Optimization(),
        Teacher(),
        {"lr": 0.004 * math.sqrt(2), "warmup": 12_500, "wd": 0.4, "momentum": 0.992},
    ),
    "long": (
        Optimization(
            num_steps=625_000,
            warmup_steps=100_000,
            global_batch_size=3072,
            base_learning_rate=2e-4,
            final_weight_decay=0.2,
            layerwise_decay=1.0,
        ),
        Teacher(momentum=0.994),
        {"lr": 2e-4 * math.sqrt(3), "warmup": 100_000, "wd": 0.2, "momentum": 0.994},
    ),
}


@pytest.mark.parametrize("name", RECIPES)
def test_schedules_equal_the_references_arrays(name: str) -> None:
    optimization, teacher, expected = RECIPES[name]
    config = make_config(optimization=optimization, teacher=teacher)
    total = optimization.num_steps
    rate = reference_array(base=expected["lr"], final=1e-6, total=total, warmup=expected["warmup"])
    decay = reference_array(base=0.04, final=expected["wd"], total=total)
    momentum = reference_array(base=expected["momentum"], final=1.0, total=total)
    temperature = reference_array(base=0.07, final=0.07, total=37_500, warmup=37_500, start=0.04)
    steps = {0, 1, 1249, 1250, expected["warmup"] - 1, expected["warmup"], 37_499, 37_500}
    for step in steps | set(range(0, total, total // 97)) | {total - 1}:
        schedule = schedule_at(step, config=config)
        assert schedule.learning_rate == pytest.approx(rate[step], abs=1e-12)
        frozen_rate = 0.0 if step < 1250 else rate[step]
        assert schedule.prototype_learning_rate == pytest.approx(frozen_rate, abs=1e-12)
        assert schedule.weight_decay == pytest.approx(decay[step], abs=1e-12)
        assert schedule.teacher_momentum == pytest.approx(momentum[step], abs=1e-12)
        expected_temperature = temperature[step] if step < 37_500 else 0.07
        assert schedule.teacher_temperature == pytest.approx(expected_temperature, abs=1e-12)


def test_the_peak_comes_twice() -> None:
    config = make_config(optimization=Optimization(), teacher=Teacher())
    before, after = (schedule_at(step, config=config).learning_rate for step in (12_499, 12_500))
    assert before == pytest.approx(after, abs=1e-15)


def test_beyond_the_run_values_are_final() -> None:
    config = make_config(optimization=Optimization(), teacher=Teacher())
    schedule = schedule_at(125_000, config=config)
    assert schedule.learning_rate == 1e-6
    assert schedule.weight_decay == 0.4
    assert schedule.teacher_momentum == 1.0


def test_short_warmups_are_defined() -> None:
    assert warmup_cosine(0, peak=1.0, final=0.0, num_steps=4) == 1.0
    assert warmup_cosine(0, peak=1.0, final=0.0, num_steps=4, warmup_steps=1) == 0.0
    assert warmup_cosine(3, peak=1.0, final=0.0, num_steps=4, warmup_steps=4) == 1.0
    assert linear_warmup(0, start=0.04, end=0.07, num_steps=1) == 0.04
    assert linear_warmup(1, start=0.04, end=0.07, num_steps=2) == pytest.approx(0.07)


def test_negative_steps_are_refused() -> None:
    config = make_config(optimization=Optimization(), teacher=Teacher())
    with pytest.raises(ValueError, match="step -1 is negative"):
        schedule_at(-1, config=config)


def test_the_backbone_is_frozen_in_the_head_warmup_only() -> None:
    config = make_config(optimization=Optimization(), teacher=Teacher())
    assert not schedule_at(0, config=config).is_backbone_frozen
    warm = config.model_copy(update={"head_warmup": HeadWarmup(num_steps=2000)})
    frozen = [schedule_at(step, config=warm).is_backbone_frozen for step in (0, 1999, 2000)]
    assert frozen == [True, True, False]


@pytest.mark.parametrize("num_steps", [1250, 125_000])
def test_a_head_warmup_leaves_steps_to_prototypes_and_backbone(num_steps: int) -> None:
    config = make_config(optimization=Optimization(), teacher=Teacher())
    changed = config.model_copy(update={"head_warmup": HeadWarmup(num_steps=num_steps)})
    with pytest.raises(ValueError, match=f"num_steps {num_steps} is not between 1250 and 125000"):
        TrainingConfig.model_validate_json(changed.model_dump_json())


def test_the_high_resolution_phase_has_no_head_warmup() -> None:
    config = make_config(optimization=Optimization(), teacher=Teacher())
    warm = config.model_copy(update={"head_warmup": HeadWarmup(num_steps=2000)})
    assert warm.at_high_resolution(HighResolution()).head_warmup is None
