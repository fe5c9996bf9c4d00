"""export: one file holds every parameter in full."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from dinov2_core.distributed.export import export_weights


def test_an_exported_file_holds_every_parameter_in_fp32(tmp_path: Path) -> None:
    path, module = tmp_path / "deep" / "weights.safetensors", nn.Linear(2, 3).to(torch.float64)
    sha256 = export_weights(module, path=path)
    assert sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    weights = load_file(path)
    assert all(weight.dtype == torch.float32 for weight in weights.values())
    assert weights.keys() == dict(module.named_parameters()).keys()
    assert all(torch.equal(weights[name], p.float()) for name, p in module.named_parameters())
    assert [p.name for p in path.parent.iterdir()] == [path.name]
