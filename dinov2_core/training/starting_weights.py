"""Starts student and teacher from existing weights, whoever trained them."""

from __future__ import annotations

import logging
from dataclasses import asdict, replace
from pathlib import Path

from torch import Tensor

from dinov2_core.config.backbone import ARCHITECTURES
from dinov2_core.config.training import TrainingConfig
from dinov2_core.training.student_teacher import StudentTeacher
from dinov2_core.vit.patch_embed import PatchGrid
from dinov2_core.vit.position import resample_positions
from dinov2_core.weights.loading import LoadReport, load_weights
from dinov2_core.weights.network_shape import NetworkShape, shape_of
from dinov2_core.weights.reading import read_state_dict
from dinov2_core.weights.starting_weights import StartingWeights, recognised

logger = logging.getLogger(__name__)

MASK_TOKEN = "backbone.mask_token"


def load_starting_weights(model: StudentTeacher, *, path: Path) -> LoadReport:
    """Fill student and teacher, neither sharded yet, with a file's teacher.

    Positions of another grid are resampled. Heads that the file lacks keep their first weights
    if a head warm-up is set; timm's networks lack the mask token, which starts at 0.

    Args:
        model: Initialised student and teacher.
        path: A checkpoint of the reference implementation, a release of it, an exported teacher,
            or a network of timm or Hugging Face; see `read_state_dict` and `recognised`.

    Returns:
        What became of every name; names of the file that belong to no teacher are unexpected.

    Raises:
        ValueError: The file cannot be read, the architecture or a head is another one, a name is
            not explained, or heads are absent and no head warm-up is set.
    """
    found = recognised(read_state_dict(path))
    _refuse_other_backbone(found, model=model)
    _refuse_other_heads(found, model=model)
    absent = _absent_heads(found, model=model)
    lacks_mask_token = found.layout == "timm"
    report = load_weights(
        model.student,
        found.weights,
        source=found.source,
        resample=resample_to_side,
        allowed_missing=(*(f"{h}." for h in absent), *([MASK_TOKEN] if lacks_mask_token else [])),
    )
    model.copy_student_to_teacher()
    report = replace(report, unexpected=(*report.unexpected, *found.left_out))
    logger.info("starting from %s (names of %s): %s", path, found.layout, report.summary)
    for name in report.resampled:
        logger.info("resampled %s", name)
    return report


def resample_to_side(positions: Tensor, side: int) -> Tensor:
    """Positions [1, 1 + M * M, D] on a grid of side x side patches, bicubic."""
    grid = PatchGrid(height=side, width=side)
    return resample_positions(positions, grid=grid, offset=0.0, antialias=True)


def _refuse_other_backbone(found: StartingWeights, *, model: StudentTeacher) -> None:
    given = shape_of(found.backbone, source=found.source)
    needed = shape_of(dict(model.student.backbone.named_parameters()), source="the model")
    values = asdict(needed)
    differing: dict[str, list[str]] = {}
    for name, value in asdict(given).items():
        follows = name == "hidden_dim" and given.embed_dim != needed.embed_dim
        if value != values[name] and not follows:
            fact = f"its {name} is {value} and the spec's {values[name]}"
            differing.setdefault(_setting(name, given=given), []).append(fact)
    if differing:
        advice = [f"{', '.join(facts)}: set {key}" for key, facts in differing.items()]
        raise ValueError(
            f"{found.source} holds another network; {'; '.join(advice)}; or give other weights"
        )


def _setting(name: str, *, given: NetworkShape) -> str:
    """Key of the spec, and its value, that makes the network like the given one."""
    match name:
        case "embed_dim" | "depth":
            fitting = [
                architecture
                for architecture, size in ARCHITECTURES.items()
                if (size.embed_dim, size.depth) == (given.embed_dim, given.depth)
            ]
            own = f"dimensions with embed_dim {given.embed_dim} and depth {given.depth}"
            return f"backbone.architecture to {fitting[0] if fitting else own}"
        case "hidden_dim":
            return f"backbone.architecture with the mlp_ratio that gives {given.hidden_dim}"
        case _:
            return f"backbone.{name} to {getattr(given, name)}"


def _refuse_other_heads(found: StartingWeights, *, model: StudentTeacher) -> None:
    """Heads are compared before names are, so that the message can name the setting."""
    if model.student.ibot_head is None and found.has_head("ibot_head"):
        raise ValueError(
            f"{found.source} holds ibot_head but ibot.head is shared; set ibot.head.kind to own, "
            "with the sizes of the file, or give other weights"
        )
    parameters = dict(model.student.named_parameters())
    for head in ("dino_head", "ibot_head"):
        name = f"{head}.last_layer.weight_v"
        if name not in parameters or name not in found.weights:
            continue
        given, needed = found.weights[name].shape, parameters[name].shape
        if given != needed:
            raise ValueError(
                f"{head} has {given[0]} prototypes of width {given[1]} in {found.source} but "
                f"{needed[0]} of width {needed[1]} in the spec; set {head.removesuffix('_head')}"
                f".head.num_prototypes to {given[0]} and bottleneck_dim to {given[1]}, or give "
                "weights of the backbone alone, with head_warmup"
            )


def _absent_heads(found: StartingWeights, *, model: StudentTeacher) -> list[str]:
    """Heads of the model that the file lacks.

    Raises:
        ValueError: There are some and nothing says that they are to be trained first.
    """
    heads = [name for name, _ in model.student.named_children() if name != "backbone"]
    absent = [head for head in heads if not found.has_head(head)]
    config: TrainingConfig = model.config
    if absent and config.head_warmup is None:
        raise ValueError(
            f"{found.source} holds no {' and no '.join(absent)}, and heads that start at random "
            "spoil the backbone; set head_warmup.num_steps, the steps in which heads alone learn, "
            f"to more than optimization.freeze_prototypes_steps "
            f"{config.optimization.freeze_prototypes_steps}, or give weights with heads"
        )
    return absent
