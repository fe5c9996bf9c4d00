"""The reference's own numbers, step by step."""

import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from dinov2_core.training.schedules import schedule_at
from tests.golden.recorder import record
from tests.golden.reference import FILE, NAMES, read_reference
from tests.golden.replay import main, replay, schedule_error, training_config

TOLERANCES = {
    "losses": 2e-6,
    "grad_norms": 5e-6,
    "grads": 2e-5,
    "final_elements": 3e-5,
    "final_update": 1e-4,
}


def errors_beyond(errors: dict[str, float]) -> dict[str, float]:
    return {n: x for n, x in errors.items() if not x <= TOLERANCES[n]}


@pytest.mark.parametrize("name", NAMES)
def test_replay_reproduces_the_reference(name: str) -> None:
    assert not errors_beyond(asdict(replay(read_reference(name))))


def test_the_command_prints_every_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(read_reference(NAMES[0]), tmp_path / "recording.pt")
    assert main([str(tmp_path / "recording.pt")]) == 0
    errors = json.loads(capsys.readouterr().out)
    assert errors.keys() == TOLERANCES.keys()
    assert not errors_beyond(errors)


@pytest.mark.parametrize("name", NAMES)
def test_schedules_are_the_recorded_ones(name: str) -> None:
    content = read_reference(name)
    config = training_config(content)
    for step, recorded in enumerate(content["steps"]):
        error = schedule_error(recorded["schedule"], schedule_at(step, config=config))
        assert error <= 1e-12, step


def test_the_reference_s_numbers_are_small_enough_to_be_kept_here() -> None:
    assert FILE.stat().st_size <= 3_000_000


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"train.centering": "sinkhorn_knopp", "ibot.separate_head": False},
        {"dino.loss_weight": 2.0, "ibot.loss_weight": 0.5},
        {"student.drop_path_uniform": False, "student.drop_path_rate": 0.5},
        {"optim.clip_grad": 0},
        {"optim.clip_grad": None},
        {"dino.head_nlayers": 1, "ibot.head_nlayers": 0},
        {"ibot.loss_weight": 0.0},
        {"ibot.loss_weight": 0.0, "train.centering": "sinkhorn_knopp"},
        {"student.proj_bias": False},
        {"student.ffn_bias": False},
        {"student.layerscale": 0},
        {"student.layerscale": None},
        {"student.interpolate_offset": None},
        {"optim.epochs": 2.0},
        {"optim.patch_embed_lr_mult": 0.0},
    ],
    ids=str,
)
def test_any_setting_of_the_reference_can_be_replayed(changes: dict[str, Any]) -> None:
    assert not errors_beyond(asdict(replay(record(changes))))


def test_centres_go_on_from_where_they_were() -> None:
    assert not errors_beyond(asdict(replay(record(center=0.3))))


def test_a_term_of_weight_zero_may_be_recorded() -> None:
    recording = record({"ibot.loss_weight": 0.0})
    recording["steps"][0]["losses"]["ibot_loss"] = 0.0
    assert not errors_beyond(asdict(replay(recording)))


def test_a_wrong_setting_shows_in_every_quantity() -> None:
    recording = record()
    recording["cfg"]["ibot"]["loss_weight"] = 0.9
    recording["cfg"]["student"]["drop_path_uniform"] = False
    assert errors_beyond(asdict(replay(recording))).keys() == TOLERANCES.keys()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"student.ffn_layer": "identity"}, r"student.ffn_layer 'identity' .* mlp, swiglu"),
        ({"train.centering": "mean"}, r"train.centering 'mean' .* centering, sinkhorn_knopp"),
        ({"optim.epochs": 2.25}, r"optim.epochs 2.25 is 4.5 steps .* whole number"),
    ],
)
def test_what_this_package_has_not_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replay(record(changes))


@pytest.mark.parametrize(
    ("recorded", "own"),
    [
        ("student.backbone.blocks.1.attn.proj.bias", "student.backbone.blocks.1.attn.proj.bias"),
        ("teacher.backbone.blocks.0.ls1.gamma", "teacher.backbone.blocks.0.ls1.gamma"),
        ("student.dino_head.mlp.0.bias", "student.dino_head.mlp.0.bias"),
        ("ibot_patch_loss.center", "ibot_targets.center"),
    ],
)
def test_a_cut_recording_says_what_it_lacks(recorded: str, own: str) -> None:
    recording = record()
    del recording["init"][recorded]
    with pytest.raises(ValueError, match=re.escape(f"init lacks ['{own}']")):
        replay(recording)


def test_parameters_beyond_the_settings_are_named() -> None:
    recording = record()
    recording["init"]["student.backbone.blocks.2.ls1.gamma"] = torch.ones(16)
    with pytest.raises(ValueError, match=r"\['student.backbone.blocks.2.ls1.gamma'\] beyond"):
        replay(recording)
