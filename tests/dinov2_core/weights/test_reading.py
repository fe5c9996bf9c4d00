"""reading: safetensors and state dicts are read, anything else is refused and never executed."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dinov2_core.errors import InputError
from dinov2_core.weights.reading import read_state_dict

TENSORS = {"norm.weight": torch.ones(2), "norm.bias": torch.zeros(2)}


def test_safetensors_and_both_forms_of_torch_save_are_read(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "a.safetensors")
    torch.save(TENSORS, tmp_path / "zip.pth")
    torch.save(TENSORS, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    for path in tmp_path.iterdir():
        state = read_state_dict(path)
        assert state.source == str(path)
        assert state.left_out == ()
        assert all(torch.equal(state.tensors[name], TENSORS[name]) for name in TENSORS)


@pytest.mark.parametrize("container", ["teacher", "model", "state_dict"])
def test_a_state_dict_within_a_training_programs_file_is_found(
    tmp_path: Path, container: str
) -> None:
    path = tmp_path / "checkpoint.pth"
    torch.save({container: TENSORS, "iteration": 7, "optimizer": {"lr": 0.1}}, path)
    state = read_state_dict(path)
    assert set(state.tensors) == set(TENSORS)
    assert state.left_out == ("iteration", "optimizer")


class Malice:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> object:
        return (Path.touch, (self.path,))


def test_code_in_a_file_does_not_run(tmp_path: Path) -> None:
    path, touched = tmp_path / "evil.pth", tmp_path / "touched"
    path.write_bytes(pickle.dumps({"norm.weight": Malice(touched)}, protocol=2))
    with pytest.raises(InputError, match="not loaded because it could run code"):
        read_state_dict(path)
    torch.save({"norm.weight": Malice(touched)}, path)
    with pytest.raises(InputError, match="could run code"):
        read_state_dict(path)
    assert not touched.exists()


def test_what_is_no_state_dict_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    with pytest.raises(InputError, match="cannot be read .No such file"):
        read_state_dict(path)
    path.write_bytes(b"not one")
    with pytest.raises(InputError, match="are not a safetensors file"):
        read_state_dict(path)
    torch.save(TENSORS, path)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(InputError, match="are damaged"):
        read_state_dict(path)
    torch.save({1: torch.ones(1)}, path)
    with pytest.raises(InputError, match=r"hold no state dict but \[1\]"):
        read_state_dict(path)
    torch.save({"lr": 0.1, "teacher": 3}, path)
    with pytest.raises(InputError, match=r"hold no state dict but \['lr', 'teacher'\]"):
        read_state_dict(path)
    torch.save([torch.ones(1)], path)
    with pytest.raises(InputError, match="hold no state dict but list"):
        read_state_dict(path)
