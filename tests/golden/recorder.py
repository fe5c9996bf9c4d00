"""A tiny run in plain torch, written down in the golden format; nothing of the package is used.

Parameters are a dictionary under the reference's names, networks are functions of it, losses are
sums over whole score matrices.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Weights = dict[str, Tensor]
WIDTH, DEPTH, HEADS, PATCH, IMAGES, LOCALS, EPOCH = 16, 2, 2, 4, 5, 2, 2
HEAD = {"head_n_prototypes": 24, "head_bottleneck_dim": 8, "head_nlayers": 2, "head_hidden_dim": 12}
# No bias in qkv: that of a key has no gradient but rounding, which Adam scales up to a whole step.
CFG: dict[str, dict[str, Any]] = {
    "dino": {**HEAD, "loss_weight": 1.0, "koleo_loss_weight": 0.1},
    "ibot": {**HEAD, "loss_weight": 1.0, "separate_head": True, "head_n_prototypes": 20},
    "train": {"OFFICIAL_EPOCH_LENGTH": EPOCH, "centering": "centering"},
    "student": {
        "qkv_bias": False, "proj_bias": True, "ffn_bias": True, "layerscale": 0.5,
        "drop_path_rate": 0.2, "drop_path_uniform": True, "ffn_layer": "mlp", "interpolate_offset": 0.1,
    },
    "teacher": {
        "momentum_teacher": 0.9, "final_momentum_teacher": 1.0, "warmup_teacher_temp": 0.04,
        "teacher_temp": 0.07, "warmup_teacher_temp_epochs": 1,
    },
    "optim": {
        "epochs": 2, "warmup_epochs": 0, "freeze_last_layer_epochs": 0, "lr": 1e-3, "min_lr": 1e-5,
        "weight_decay": 0.04, "weight_decay_end": 0.4, "clip_grad": 0.5, "layerwise_decay": 0.8,
        "patch_embed_lr_mult": 0.2, "adamw_beta1": 0.9, "adamw_beta2": 0.99,
    },
    "crops": {"global_crops_size": 16, "local_crops_size": 8, "local_crops_number": LOCALS},
}  # fmt: skip


def record(changes: dict[str, Any] | None = None, *, center: float = 0.0) -> dict[str, Any]:
    """Train two steps; changes are settings by dotted name, center is the centres' first value."""
    cfg = copy.deepcopy(CFG)
    for name, value in (changes or {}).items():
        section, key = name.split(".")
        cfg[section][key] = value
    torch.manual_seed(7)
    student = {name: value.requires_grad_() for name, value in _initial(cfg).items()}
    teacher = _initial(cfg)  # unlike the student: losses of equals are small differences
    sizes = {"dino_loss.center": len(student["dino_head.last_layer.weight_g"])}
    if cfg["ibot"]["loss_weight"]:
        sizes["ibot_patch_loss.center"] = len(_head(student, "ibot")["last_layer.weight_g"])
    centers = {name: torch.linspace(-center, center, size) for name, size in sizes.items()}
    waiting: Weights = {}
    optimizer = torch.optim.AdamW([_group(name, p, cfg["optim"]) for name, p in student.items()])
    init, steps = _state(student, teacher, centers), []
    for step, temperature in enumerate((0.04, 0.07)):
        data = _batch()
        torch.manual_seed(100 + step)
        targets = _targets(teacher, data, temperature, (centers, waiting), cfg)
        losses, total = _losses(student, data, targets, cfg)
        optimizer.zero_grad()
        torch.autograd.backward(total)
        grads = {n: p.grad.clone() for n, p in student.items() if p.grad is not None}
        norms = _clip(student, cfg["optim"]["clip_grad"] or math.inf)
        for group in optimizer.param_groups:
            group["lr"] = _cosine(1e-3, 1e-5, step) * group["factor"]
            group["weight_decay"] = _cosine(0.04, 0.4, step) * group["decays"]
        optimizer.step()
        for name, value in student.items():
            teacher[name].lerp_(value.detach(), 1 - _cosine(0.9, 1.0, step))
        kept = {"losses": losses, "grad_norms": norms, "grads": grads}
        steps.append({"seed": 100 + step, "data": data, **kept})
    final = _state(student, teacher, centers)
    return {"cfg": cfg, "backbone": _backbone(cfg), "init": init, "steps": steps, "final": final}


def _backbone(cfg: dict[str, Any]) -> dict[str, Any]:
    student = cfg["student"]
    return {
        "embed_dim": WIDTH, "depth": DEPTH, "num_heads": HEADS, "mlp_ratio": 2.0, "block_chunks": 0,
        "ffn": student["ffn_layer"], "patch_size": PATCH, "num_register_tokens": 0,
        "drop_path_rate": student["drop_path_rate"], "layer_scale": student["layerscale"],
        "interpolate_offset": student["interpolate_offset"], "interpolate_antialias": False,
    }  # fmt: skip


def _initial(cfg: dict[str, Any]) -> Weights:
    """Random weights, biases and factors included, so that none can be mistaken for another."""
    settings, weights = cfg["student"], {}

    def linear(name: str, *shape: int, bias: bool = True) -> None:
        weights[f"{name}.weight"] = torch.randn(shape) * 0.2 + ("norm" in name)
        if bias:
            weights[f"{name}.bias"] = torch.randn(shape[0]) * 0.2

    for name, shape in {"cls_token": (1, 1), "pos_embed": (1, 17), "mask_token": (1,)}.items():
        weights[f"backbone.{name}"] = torch.randn(*shape, WIDTH)
    linear("backbone.patch_embed.proj", WIDTH, 3, PATCH, PATCH)
    linear("backbone.norm", WIDTH)
    for block in (f"backbone.blocks.{i}" for i in range(DEPTH)):
        linear(f"{block}.norm1", WIDTH)
        linear(f"{block}.attn.qkv", 3 * WIDTH, WIDTH, bias=settings["qkv_bias"])
        linear(f"{block}.attn.proj", WIDTH, WIDTH, bias=settings["proj_bias"])
        linear(f"{block}.norm2", WIDTH)
        linear(f"{block}.mlp.fc1", 2 * WIDTH, WIDTH, bias=settings["ffn_bias"])
        linear(f"{block}.mlp.fc2", WIDTH, 2 * WIDTH, bias=settings["ffn_bias"])
        if settings["layerscale"]:
            weights |= {f"{block}.ls{i}.gamma": 0.5 + torch.rand(WIDTH) for i in (1, 2)}
    has_own = cfg["ibot"]["separate_head"] and cfg["ibot"]["loss_weight"]
    for head in ("dino", "ibot") if has_own else ("dino",):
        size, bottleneck, layers, hidden = (cfg[head][key] for key in HEAD)
        widths = [WIDTH, *[hidden] * (layers - 1), bottleneck]
        for i in range(len(widths) - 1):
            name = f"{head}_head.mlp.{2 * i}" if layers > 1 else f"{head}_head.mlp"
            linear(name, widths[i + 1], widths[i])
        weights[f"{head}_head.last_layer.weight_g"] = torch.ones(size, 1)
        weights[f"{head}_head.last_layer.weight_v"] = torch.randn(size, bottleneck)
    return weights


def _group(name: str, parameter: Tensor, optim: dict[str, Any]) -> dict[str, Any]:
    blocks_above = 0
    if name.startswith("backbone.blocks."):
        blocks_above = DEPTH - int(name.split(".")[2])
    elif name.startswith("backbone.") and not name.startswith("backbone.norm"):
        blocks_above = DEPTH + 1
    factor = optim["layerwise_decay"] ** blocks_above
    factor *= optim["patch_embed_lr_mult"] if "patch_embed" in name else 1.0
    is_exempt = name.endswith((".bias", ".gamma")) or "norm" in name
    betas = (optim["adamw_beta1"], optim["adamw_beta2"])
    return {"params": [parameter], "betas": betas, "factor": factor, "decays": 1.0 - is_exempt}


def _cosine(first: float, last: float, step: int) -> float:
    return last + (first - last) * (1 + math.cos(math.pi * step / (2 * EPOCH))) / 2


def _state(student: Weights, teacher: Weights, centers: Weights) -> Weights:
    state = {name: value.clone().view(1, -1) for name, value in centers.items()}
    state |= {f"student.{name}": value.detach().clone() for name, value in student.items()}
    return state | {f"teacher.{name}": value.clone() for name, value in teacher.items()}


def _batch() -> dict[str, Any]:
    """Random images; every other global crop has masked patches, of different number."""
    masks = torch.zeros(2 * IMAGES, 16, dtype=torch.bool)
    for crop in range(0, 2 * IMAGES, 2):
        masks[crop, torch.randperm(16)[: crop + 2]] = True
    return {
        "collated_global_crops": torch.randn(2 * IMAGES, 3, 16, 16),
        "collated_local_crops": torch.randn(LOCALS * IMAGES, 3, 8, 8),
        "collated_masks": masks,
        "mask_indices_list": masks.flatten().nonzero().flatten(),
        "masks_weight": torch.cat([1 / mask.sum().expand(int(mask.sum())) for mask in masks]),
    }


def _part(w: Weights, prefix: str) -> Weights:
    return {name.removeprefix(prefix): x for name, x in w.items() if name.startswith(prefix)}


def _linear(w: Weights, name: str, x: Tensor) -> Tensor:
    return F.linear(x, w[f"{name}.weight"], w.get(f"{name}.bias"))


def _norm(w: Weights, name: str, x: Tensor) -> Tensor:
    return F.layer_norm(x, (WIDTH,), w[f"{name}.weight"], w[f"{name}.bias"], eps=1e-6)


def _embed(w: Weights, images: Tensor, mask: Tensor | None, offset: float) -> Tensor:
    """Tokens [B, 1 + N, D] of images, with positions of a grid of 4 x 4 or resampled from it."""
    x = F.conv2d(images, w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], stride=PATCH)
    side, x = x.shape[-1], x.flatten(2).transpose(1, 2)
    if mask is not None:
        x = torch.where(mask[..., None], w["mask_token"], x)
    positions = w["pos_embed"]
    if side != 4:
        grid = positions[:, 1:].view(1, 4, 4, WIDTH).permute(0, 3, 1, 2)
        size: dict[str, Any] = {"scale_factor": (side + offset) / 4} if offset else {"size": side}
        grid = F.interpolate(grid, mode="bicubic", **size)
        positions = torch.cat([positions[:, :1], grid.flatten(2).transpose(1, 2)], dim=1)
    return torch.cat([w["cls_token"].expand(len(x), -1, -1), x], dim=1) + positions


def _attention(w: Weights, x: Tensor) -> Tensor:
    qkv = _linear(w, "attn.qkv", _norm(w, "norm1", x))
    q, k, v = qkv.view(*x.shape[:2], 3, HEADS, -1).permute(2, 0, 3, 1, 4)  # [B, heads, tokens, d]
    scores = q @ k.transpose(-1, -2) / math.sqrt(WIDTH / HEADS)
    x = _linear(w, "attn.proj", (scores.softmax(dim=-1) @ v).transpose(1, 2).flatten(2))
    return x * w.get("ls1.gamma", 1.0)


def _mlp(w: Weights, x: Tensor) -> Tensor:
    x = _linear(w, "mlp.fc1", _norm(w, "norm2", x))
    return _linear(w, "mlp.fc2", F.gelu(x)) * w.get("ls2.gamma", 1.0)


def _blocks(w: Weights, groups: list[Tensor], rates: list[float]) -> list[Tensor]:
    """Tokens after all blocks; a branch draws the crops that it adds to for all groups first."""
    for i, rate in enumerate(rates):
        for branch in (_attention, _mlp):
            drawn = [torch.randperm(len(x)) if rate else torch.arange(len(x)) for x in groups]
            kept = [rows[: max(int(len(rows) * (1 - rate)), 1)] for rows in drawn]
            changes = [
                branch(_part(w, f"blocks.{i}."), x[rows]) * (len(x) / len(rows))
                for x, rows in zip(groups, kept, strict=True)
            ]
            groups = [x.index_add(0, *add) for x, *add in zip(groups, kept, changes, strict=True)]
    return [_norm(w, "norm", x) for x in groups]


def _head(w: Weights, name: str) -> Weights:
    """Weights of a head; patches without their own use the other's."""
    return _part(w, f"{name}_head.") or _part(w, "dino_head.")


def _scores(w: Weights, tokens: Tensor) -> Tensor:
    """Scores [M, K] of a head."""
    layers = sorted(name.removesuffix(".weight") for name in w if name.startswith("mlp"))
    for i, layer in enumerate(name for name in layers if not name.endswith(".bias")):
        tokens = _linear(w, layer, F.gelu(tokens) if i else tokens)
    directions = F.normalize(w["last_layer.weight_v"], dim=1) * w["last_layer.weight_g"]
    return F.normalize(tokens, dim=-1) @ directions.T


@torch.no_grad()
def _targets(
    teacher: Weights,
    data: dict[str, Any],
    temperature: float,
    means: tuple[Weights, Weights],
    cfg: dict[str, Any],
) -> Weights:
    """Targets of cls tokens and masked patches; centres move by the means of the batch before."""
    w, (centers, waiting) = _part(teacher, "backbone."), means
    (x,) = _blocks(w, [_embed(w, data["collated_global_crops"], None, 0.0)], [0.0] * DEPTH)
    tokens = {"dino": x[:, 0], "ibot": x[:, 1:][data["collated_masks"]]}
    targets = {}
    for name in centers:
        head = name.split("_")[0]
        scores = _scores(_head(teacher, head), tokens[head])
        if cfg["train"]["centering"] == "centering":
            if name in waiting:
                centers[name] = 0.9 * centers[name] + 0.1 * waiting[name]
            waiting[name] = scores.mean(dim=0)
            targets[head] = ((scores - centers[name]) / temperature).softmax(dim=1)
        else:
            targets[head] = (scores / temperature).exp()
            for dim in (0, 1) * 3:
                targets[head] = F.normalize(targets[head], p=1, dim=dim)
    return targets


def _losses(
    student: Weights, data: dict[str, Any], targets: Weights, cfg: dict[str, Any]
) -> tuple[dict[str, float], Tensor]:
    """Losses as the reference logs them, and their weighted sum that it trains on."""
    settings, masks, w = cfg["student"], data["collated_masks"], _part(student, "backbone.")
    rates = [settings["drop_path_rate"]] * DEPTH
    if not settings["drop_path_uniform"]:
        rates = [rate * i / (DEPTH - 1) for i, rate in enumerate(rates)]
    offset = settings["interpolate_offset"] or 0.0
    embedded = [
        _embed(w, data["collated_global_crops"], masks, offset),
        _embed(w, data["collated_local_crops"], None, offset),
    ]
    x, local = _blocks(w, embedded, rates)

    def entropies(target: Tensor, head: str, tokens: Tensor) -> Tensor:
        log_shares = (_scores(_head(student, head), tokens) / 0.1).log_softmax(dim=-1)
        return -(target * log_shares).sum(dim=-1)

    both, pairs = targets["dino"].chunk(2), 2 * LOCALS + 2
    crops, locals_ = x[:, 0].chunk(2), local[:, 0].chunk(LOCALS)
    near = [entropies(target, "dino", crop).mean() for crop in locals_ for target in both]
    far = [entropies(both[1 - i], "dino", crop).mean() for i, crop in enumerate(crops)]
    spread = [-_nearest(crop).log().mean() for crop in crops]
    koleo = cfg["dino"]["koleo_loss_weight"] * torch.stack(spread).sum()
    losses = {
        "dino_local_crops_loss": torch.stack(near).sum() / pairs,
        "dino_global_crops_loss": torch.stack(far).sum() / pairs,
        "koleo_loss": koleo / 2,
    }
    total = cfg["dino"]["loss_weight"] * torch.stack(near + far).sum() / pairs + koleo
    if "ibot" in targets:
        patches = entropies(targets["ibot"], "ibot", x[:, 1:][masks])
        ibot = (patches * data["masks_weight"]).sum() / len(masks)
        losses["ibot_loss"] = ibot / 2
        total = total + cfg["ibot"]["loss_weight"] * ibot
    return {name: value.item() for name, value in losses.items()}, total


def _nearest(tokens: Tensor) -> Tensor:
    """Distance [B] of each direction to the nearest other one."""
    unit = F.normalize(tokens, dim=1)
    squares = (unit[:, None] - unit[None]).square().sum(dim=2) + 9 * torch.eye(len(unit))
    return squares.min(dim=1).values.sqrt() + 1e-8


def _clip(student: Weights, limit: float) -> dict[str, float]:
    """Scale the gradients of backbone and heads to a norm each; their norms before."""
    norms = {}
    for module in dict.fromkeys(name.split(".")[0] for name in student):
        grads = [p.grad for p in _part(student, f"{module}.").values() if p.grad is not None]
        norms[module] = torch.cat([grad.flatten() for grad in grads]).norm().item()
        for grad in grads:
            grad.mul_(min(1.0, limit / (norms[module] + 1e-6)))
    return norms
