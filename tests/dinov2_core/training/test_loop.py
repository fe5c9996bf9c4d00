"""loop: stopped and resumed equals straight, bit for bit, and nothing is spoilt on the way."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor

from dinov2_core.config.backbone import Backbone, Dimensions
from dinov2_core.config.execution import Checkpoints, Execution
from dinov2_core.config.guards import Guards
from dinov2_core.config.objectives import (
    DinoObjective,
    Head,
    IbotObjective,
    SinkhornKnopp,
    SoftmaxCentering,
)
from dinov2_core.config.training import (
    Crops,
    HeadWarmup,
    HighResolution,
    Optimization,
    Teacher,
    TrainingConfig,
)
from dinov2_core.data.loader import PretrainLoader
from dinov2_core.data.shards import ShardWriter
from dinov2_core.distributed.mesh import Ranks, process_group
from dinov2_core.errors import InputError, NonFiniteLoss, SettingsError
from dinov2_core.training.initialization import build_student_teacher
from dinov2_core.training.loop import TrainingRun
from dinov2_core.training.starting_weights import load_starting_weights
from dinov2_core.training.step_clock import StepPhase
from dinov2_core.training.step_report import StepReport

HEAD = Head(num_prototypes=64, bottleneck_dim=16, hidden_dim=32)
CONFIG = TrainingConfig(
    backbone=Backbone(
        architecture=Dimensions(embed_dim=32, depth=2, num_heads=2),
        patch_size_pixels=4,
        layer_scale=0.1,
        drop_path_rate=0.3,
    ),
    crops=Crops(global_crop_size_pixels=16, local_crop_size_pixels=8, num_local_crops=2),
    dino=DinoObjective(head=HEAD),
    ibot=IbotObjective(head=HEAD),
    centering=SoftmaxCentering(),
    teacher=Teacher(momentum=0.9, temperature_warmup_steps=2),
    optimization=Optimization(
        num_steps=6,
        warmup_steps=1,
        global_batch_size=8,
        base_learning_rate=0.02,
        freeze_prototypes_steps=1,
    ),
    precision="fp32",
    checkpoints=Checkpoints(every_steps=2, keep_last=2),
)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("shards")
    rng = np.random.default_rng(0)
    with ShardWriter(directory, target_size_bytes=4000) as writer:
        for _ in range(16):
            buffer = io.BytesIO()
            colour = rng.integers(0, 226, 3) + rng.integers(0, 30, (20, 20, 3))
            Image.fromarray(colour.astype(np.uint8)).save(buffer, "PNG")
            writer.add(buffer.getvalue(), extension="png", width=20, height=20)
    return directory


@pytest.fixture
def ranks() -> Iterator[Ranks]:
    with process_group() as ranks:
        yield ranks


def changed(config: TrainingConfig, **optimization: object) -> TrainingConfig:
    return config.model_copy(
        update={"optimization": config.optimization.model_copy(update=optimization)}
    )


def finish(run: TrainingRun, shards: Path) -> list[StepReport]:
    return list(run.steps(shards=shards, loader_threads=1))


def test_stopped_and_resumed_equals_straight(ranks: Ranks, shards: Path, tmp_path: Path) -> None:
    straight = TrainingRun(CONFIG, ranks=ranks, checkpoints=tmp_path / "straight")
    expected = finish(straight, shards)
    sha256 = straight.export_teacher(tmp_path / "straight.safetensors")

    first = TrainingRun(CONFIG, ranks=ranks, checkpoints=tmp_path / "stopped")
    reports = list(
        first.steps(
            shards=shards,
            loader_threads=1,
            should_stop=lambda: first.num_steps_done == 2,
        )
    )
    assert not first.is_finished
    assert [report.writes_checkpoint for report in reports] == [False, True, True]

    second = TrainingRun(CONFIG, ranks=ranks, checkpoints=tmp_path / "stopped")
    assert second.first_step == 3
    assert (tmp_path / "stopped" / "step_00000003").is_dir()
    reports += finish(second, shards)
    assert second.is_finished
    assert [report.step for report in reports] == list(range(6))
    assert [report.losses for report in reports] == [report.losses for report in expected]
    assert [r.gradient_norms for r in reports] == [r.gradient_norms for r in expected]
    assert second.export_teacher(tmp_path / "stopped.safetensors") == sha256


def test_in_parts_and_padded_stopped_at_any_step_equals_straight(
    ranks: Ranks, shards: Path, tmp_path: Path
) -> None:
    config = changed(CONFIG, accumulation_steps=2, num_steps=4).model_copy(
        update={"execution": Execution(pads_masked_patches=True)}
    )
    straight = TrainingRun(config, ranks=ranks, checkpoints=tmp_path / "straight")
    expected = [report.losses for report in finish(straight, shards)]
    for last in range(3):
        folder = tmp_path / f"stopped_{last}"
        run = TrainingRun(config, ranks=ranks, checkpoints=folder)
        steps = run.steps(
            shards=shards,
            loader_threads=1,
            should_stop=lambda run=run, n=last: run.num_steps_done == n,
        )
        losses = [report.losses for report in steps]
        resumed = TrainingRun(config, ranks=ranks, checkpoints=folder)
        assert resumed.first_step == last + 1
        losses += [report.losses for report in finish(resumed, shards)]
        assert losses == expected


def test_a_killed_run_goes_on_from_its_last_checkpoint(
    ranks: Ranks, shards: Path, tmp_path: Path
) -> None:
    run = TrainingRun(CONFIG, ranks=ranks, checkpoints=tmp_path)
    for report in run.steps(shards=shards, loader_threads=1):
        if report.step == 4:
            break
    assert TrainingRun(CONFIG, ranks=ranks, checkpoints=tmp_path).first_step == 4


def test_a_finished_run_takes_no_step(ranks: Ranks, shards: Path, tmp_path: Path) -> None:
    finish(TrainingRun(CONFIG, ranks=ranks, checkpoints=tmp_path), shards)
    again = TrainingRun(CONFIG, ranks=ranks, checkpoints=tmp_path)
    assert again.is_finished
    assert finish(again, shards) == []
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_00000004", "step_00000006"]


def test_training_lowers_the_loss(ranks: Ranks, shards: Path, tmp_path: Path) -> None:
    easy = CONFIG.model_copy(update={"centering": SinkhornKnopp(), "koleo": None})
    config = changed(easy, num_steps=40, warmup_steps=4)
    reports = finish(TrainingRun(config, ranks=ranks, checkpoints=tmp_path), shards)
    start = sum(r.losses["dino_global"] + r.losses["ibot"] for r in reports[:5])
    end = sum(r.losses["dino_global"] + r.losses["ibot"] for r in reports[-5:])
    assert end < 0.97 * start
    assert all(r.images_per_second > 0 and r.data_seconds <= r.seconds for r in reports)


def test_bf16_stays_close_to_fp32(ranks: Ranks, shards: Path, tmp_path: Path) -> None:
    losses = []
    for precision in ("fp32", "bf16"):
        config = CONFIG.model_copy(update={"precision": precision})
        run = TrainingRun(config, ranks=ranks, checkpoints=tmp_path / precision)
        losses.append(next(iter(run.steps(shards=shards, loader_threads=1))).losses["total"])
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
    assert losses[1] != losses[0]


def test_a_non_finite_loss_stops_before_the_weights_change(
    ranks: Ranks, shards: Path, tmp_path: Path
) -> None:
    strict = CONFIG.model_copy(update={"guards": Guards(max_consecutive_skips=0, max_rollbacks=0)})
    config = changed(strict, warmup_steps=0, base_learning_rate=1e30)
    run = TrainingRun(config, ranks=ranks, checkpoints=tmp_path)
    with pytest.raises(NonFiniteLoss, match="step 1: total is nan on rank 0") as raised:
        finish(run, shards)
    assert run.num_steps_done == 1
    assert not list(tmp_path.iterdir())
    diagnosis = raised.value.diagnosis
    assert diagnosis.step == 1
    assert len(diagnosis.images[0]) == 8
    assert all(name in str(raised.value) for name in diagnosis.images[0])


class PoisonedRun(TrainingRun):
    """Weights turn to NaN once, before a given step."""

    poisoned_step = -1

    def _step(self, loader: PretrainLoader, **options: object) -> Any:
        if self.num_steps_done == self.poisoned_step:
            self.poisoned_step = -1
            self._model.student.backbone.norm.weight.detach().fill_(torch.nan)
        return super()._step(loader, **options)  # type: ignore[arg-type]


def test_a_run_that_stays_non_finite_rolls_back_with_a_lower_learning_rate(
    ranks: Ranks, shards: Path, tmp_path: Path
) -> None:
    guards = Guards(max_consecutive_skips=1, rollback_learning_rate_factor=0.25)
    config = CONFIG.model_copy(update={"guards": guards})
    run = PoisonedRun(config, ranks=ranks, checkpoints=tmp_path / "checkpoints")
    run.poisoned_step = 3
    reports = finish(run, shards)
    assert [report.step for report in reports] == [0, 1, 2, 3, 4, 2, 3, 4, 5]
    assert [r.guards.is_skipped for r in reports] == [False] * 3 + [True] * 2 + [False] * 4
    assert [r.guards.num_rollbacks for r in reports] == [0] * 5 + [1] * 4
    assert reports[-1].guards.num_skipped == 2
    assert not any(report.writes_checkpoint for report in reports[2:5])
    assert reports[2].losses == reports[5].losses  # from the same weights and images
    for before, after in zip(reports[2:5], reports[5:8], strict=True):
        assert after.schedule.learning_rate == 0.25 * before.schedule.learning_rate


def test_a_resumed_run_remembers_that_it_rolled_back(
    ranks: Ranks, shards: Path, tmp_path: Path
) -> None:
    config = CONFIG.model_copy(update={"guards": Guards(max_consecutive_skips=0)})
    straight = PoisonedRun(config, ranks=ranks, checkpoints=tmp_path / "straight")
    straight.poisoned_step = 3
    expected = finish(straight, shards)
    sha256 = straight.export_teacher(tmp_path / "straight.safetensors")

    killed = PoisonedRun(config, ranks=ranks, checkpoints=tmp_path / "killed")
    killed.poisoned_step = 3
    for report in killed.steps(shards=shards, loader_threads=1):
        if report.guards.num_rollbacks:
            break  # before another checkpoint is due
    again = TrainingRun(config, ranks=ranks, checkpoints=tmp_path / "killed")
    assert again.first_step == 2
    reports = finish(again, shards)
    assert [r.losses for r in reports] == [r.losses for r in expected[-4:]]
    assert [r.guards for r in reports] == [r.guards for r in expected[-4:]]
    assert again.export_teacher(tmp_path / "again.safetensors") == sha256


class DeferredRun(PoisonedRun):
    """Reads its numbers when the next step is issued, as on CUDA."""

    def __init__(self, config: TrainingConfig, **options: Any) -> None:
        super().__init__(config, **options)
        self._num_unread = 1


@pytest.mark.parametrize("max_consecutive_skips", [0, 1, 5])
def test_numbers_read_a_step_later_change_nothing(
    ranks: Ranks, shards: Path, tmp_path: Path, max_consecutive_skips: int
) -> None:
    """One poisoned step, which skips up to the end, or rolls back before it."""
    guards = Guards(max_consecutive_skips=max_consecutive_skips, max_rollbacks=1)
    config = CONFIG.model_copy(update={"guards": guards})
    outcomes = []
    for kind in (PoisonedRun, DeferredRun):
        run = kind(config, ranks=ranks, checkpoints=tmp_path / kind.__name__)
        run.poisoned_step = 3
        reports = finish(run, shards)
        state = {k: whole(v) for k, v in run._state().items()}
        outcomes.append((reports, state))
    (reports, state), (deferred, deferred_state) = outcomes
    for one, other in zip(reports, deferred, strict=True):
        for name in ("step", "schedule", "guards", "writes_checkpoint"):
            assert getattr(one, name) == getattr(other, name)
        assert repr(one.losses) == repr(other.losses)  # NaN equals NaN
        assert repr(one.gradient_norms) == repr(other.gradient_norms)
    assert any(report.guards.is_skipped for report in reports)
    for name, tensor in state.items():
        assert torch.equal(tensor.nan_to_num(), deferred_state[name].nan_to_num()), name


def whole(tensor: torch.Tensor) -> torch.Tensor:
    full: torch.Tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return full.detach().clone()


def test_a_stop_that_is_read_a_step_later_resumes_exactly(
    ranks: Ranks, shards: Path, tmp_path: Path
) -> None:
    straight = TrainingRun(CONFIG, ranks=ranks, checkpoints=tmp_path / "straight")
    expected = finish(straight, shards)
    sha256 = straight.export_teacher(tmp_path / "straight.safetensors")
    first = DeferredRun(CONFIG, ranks=ranks, checkpoints=tmp_path / "stopped")
    steps = first.steps(
        shards=shards, loader_threads=1, should_stop=lambda: first.num_steps_done == 2
    )
    reports = list(steps)
    assert [report.step for report in reports] == [0, 1, 2, 3]
    assert [report.writes_checkpoint for report in reports] == [False, True, False, True]
    second = DeferredRun(CONFIG, ranks=ranks, checkpoints=tmp_path / "stopped")
    assert second.first_step == 4
    reports += finish(second, shards)
    assert [report.losses for report in reports] == [report.losses for report in expected]
    assert second.export_teacher(tmp_path / "stopped.safetensors") == sha256


def test_without_a_checkpoint_a_run_rolls_back_to_its_start(
    ranks: Ranks, shards: Path, tmp_path: Path
) -> None:
    guards = Guards(max_consecutive_skips=0, max_rollbacks=1, rollback_learning_rate_factor=1.0)
    run = PoisonedRun(
        CONFIG.model_copy(update={"guards": guards}), ranks=ranks, checkpoints=tmp_path / "run"
    )
    run.poisoned_step = 1
    reports = finish(run, shards)
    assert [report.step for report in reports] == [0, 1, 0, 1, 2, 3, 4, 5]
    straight = finish(TrainingRun(CONFIG, ranks=ranks, checkpoints=tmp_path / "straight"), shards)
    assert [r.losses for r in reports[2:]] == [r.losses for r in straight]


def test_phases_add_up_to_the_step(ranks: Ranks, shards: Path, tmp_path: Path) -> None:
    reports = finish(TrainingRun(CONFIG, ranks=ranks, checkpoints=tmp_path), shards)
    for report in reports:
        assert set(report.phase_seconds) == set(get_args(StepPhase))
        assert sum(report.phase_seconds.values()) == pytest.approx(report.seconds, abs=2e-3)
        assert all(seconds > 0 for seconds in report.phase_seconds.values())


def test_other_settings_do_not_resume(ranks: Ranks, shards: Path, tmp_path: Path) -> None:
    finish(TrainingRun(CONFIG, ranks=ranks, checkpoints=tmp_path), shards)
    rarer = CONFIG.model_copy(update={"checkpoints": Checkpoints(every_steps=5)})
    assert TrainingRun(rarer, ranks=ranks, checkpoints=tmp_path).is_finished
    with pytest.raises(SettingsError, match="was written with other settings"):
        TrainingRun(changed(CONFIG, weight_decay=0.0), ranks=ranks, checkpoints=tmp_path)


def test_a_higher_resolution_starts_from_teacher_and_heads(
    ranks: Ranks, shards: Path, tmp_path: Path
) -> None:
    path = tmp_path / "teacher.safetensors"
    finish(run := TrainingRun(CONFIG, ranks=ranks, checkpoints=tmp_path / "pretrain"), shards)
    run.export_teacher(path)
    weights = load_file(path)
    high = CONFIG.at_high_resolution(
        HighResolution(
            num_steps=2,
            global_crop_size_pixels=24,
            local_crop_size_pixels=8,
            global_batch_size=4,
        )
    )
    model = build_student_teacher(high, device=ranks.device)
    assert load_starting_weights(model, path=path).resampled == ("backbone.pos_embed",)
    for part in (model.student, model.teacher):
        for name, parameter in part.named_parameters():
            if name == "backbone.pos_embed":
                assert parameter.shape == (1, 1 + 36, 32)
                assert parameter[:, 0].equal(weights[name][:, 0])
                old, new = weights[name][0, 1:].view(4, 4, -1), parameter[0, 1:].view(6, 6, -1)
                torch.testing.assert_close(new.mean((0, 1)), old.mean((0, 1)), atol=0.01, rtol=0)
            else:
                assert parameter.equal(weights[name]), name
    tuned = TrainingRun(high, ranks=ranks, checkpoints=tmp_path / "fine", starting_weights=path)
    assert len(finish(tuned, shards)) == 2
    tuned.export_teacher(tmp_path / "tuned.safetensors")
    assert load_file(tmp_path / "tuned.safetensors")["backbone.pos_embed"].shape[1] == 37


def test_weights_that_do_not_fit_are_named(ranks: Ranks, tmp_path: Path) -> None:
    model = build_student_teacher(CONFIG, device=ranks.device)
    weights = {k: v.detach().clone() for k, v in model.teacher.named_parameters()}
    path = tmp_path / "weights.safetensors"

    def build() -> None:
        load_starting_weights(build_student_teacher(CONFIG, device=ranks.device), path=path)

    with pytest.raises(InputError, match="cannot be read"):
        build()
    path.write_bytes(b"not one")
    with pytest.raises(InputError, match="are not a safetensors file"):
        build()
    save_file({k: v for k, v in weights.items() if "norm" not in k}, path)
    with pytest.raises(InputError, match=r"lacks 10 parameters: backbone.blocks.0.norm1.bias"):
        build()
    save_file(weights | {"extra": torch.zeros(1)}, path)
    with pytest.raises(InputError, match="also holds 1 parameters: extra"):
        build()
    save_file(
        weights | {"backbone.cls_token": weights["backbone.cls_token"][..., :8].clone()}, path
    )
    with pytest.raises(InputError, match=r"cls_token has shape \[1, 1, 8\] in .* but \[1, 1, 32\]"):
        build()


def test_heads_learn_first_on_a_backbone_that_keeps_every_bit(
    ranks: Ranks, shards: Path, tmp_path: Path
) -> None:
    path = tmp_path / "backbone.safetensors"
    other = build_student_teacher(CONFIG.model_copy(update={"seed": 7}), device=ranks.device)
    given = {k: v.detach().clone() for k, v in other.teacher.backbone.named_parameters()}
    save_file(given, path)
    config = CONFIG.model_copy(update={"head_warmup": HeadWarmup(num_steps=4)})
    run = TrainingRun(config, ranks=ranks, checkpoints=tmp_path / "run", starting_weights=path)
    assert run.starting_report is not None
    assert len(run.starting_report.loaded) == len(given)

    def of_both() -> list[dict[str, torch.Tensor]]:
        parts = (run._model.student, run._model.teacher)
        return [{k: p.full_tensor().clone() for k, p in m.named_parameters()} for m in parts]

    first = of_both()[0]
    for report in run.steps(shards=shards, loader_threads=1):
        is_frozen = report.step < 4
        assert report.schedule.is_backbone_frozen == is_frozen
        for weights in of_both():
            kept = [torch.equal(weights[f"backbone.{name}"], given[name]) for name in given]
            assert all(kept) == is_frozen
            moved = [not torch.equal(weights[k], first[k]) for k in first if "head." in k]
            assert all(moved) == (report.step > 0)  # the learning rate starts at 0
    again = TrainingRun(config, ranks=ranks, checkpoints=tmp_path / "run", starting_weights=path)
    assert again.starting_report is None  # the checkpoint holds more than the file
