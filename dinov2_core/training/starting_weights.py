"""Starts student and teacher from existing weights, whoever trained them."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

from dinov2_core.config.training import TrainingConfig
from dinov2_core.errors import InputError
from dinov2_core.training.student_teacher import StudentTeacher
from dinov2_core.weights.architecture import check_same_backbone
from dinov2_core.weights.layouts import StartingWeights, with_own_names
from dinov2_core.weights.loading import LoadReport, load_weights
from dinov2_core.weights.reading import read_state_dict

logger = logging.getLogger(__name__)


def load_starting_weights(model: StudentTeacher, *, path: Path) -> LoadReport:
    """Fill student and teacher, neither sharded yet, with a file's teacher.

    Positions of another grid are resampled. Heads that the file lacks keep their first weights
    if a head warm-up is set; timm's networks lack the mask token, which starts at 0.

    Args:
        model: Initialised student and teacher.
        path: A checkpoint of the reference implementation, a release of it, an exported teacher,
            or a network of timm or Hugging Face; see `read_state_dict` and `with_own_names`.

    Returns:
        How every name was treated; names of the file that belong to no teacher are unexpected.

    Raises:
        InputError: The file cannot be read, the architecture or a head is another one, a name is
            not explained, or heads are absent and no head warm-up is set.
    """
    found = with_own_names(read_state_dict(path))
    check_same_backbone(
        found.backbone, dict(model.student.backbone.named_parameters()), source=found.source
    )
    _check_heads(found, model=model)
    absent = _absent_heads(found, model=model)
    report = load_weights(
        model.student,
        found.weights,
        source=found.source,
        resamples_positions=True,
        allowed_missing=(*(f"{head}." for head in absent), *found.absent),
    )
    model.copy_student_to_teacher()
    report = replace(report, unexpected=(*report.unexpected, *found.left_out))
    logger.info("starting from %s (names of %s): %s", path, found.layout, report.summary)
    for name in report.resampled:
        logger.info("resampled %s", name)
    return report


def _check_heads(found: StartingWeights, *, model: StudentTeacher) -> None:
    """Heads are compared before names are, so that the message can name the setting."""
    if model.student.ibot_head is None and found.has_head("ibot_head"):
        raise InputError(
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
            raise InputError(
                f"{head} has {given[0]} prototypes of width {given[1]} in {found.source} but "
                f"{needed[0]} of width {needed[1]} in the spec; set {head.removesuffix('_head')}"
                f".head.num_prototypes to {given[0]} and bottleneck_dim to {given[1]}, or give "
                "weights of the backbone alone, with head_warmup"
            )


def _absent_heads(found: StartingWeights, *, model: StudentTeacher) -> list[str]:
    """Heads of the model that the file lacks.

    Raises:
        InputError: There are some, and no head warm-up is set.
    """
    heads = [name for name, _ in model.student.named_children() if name != "backbone"]
    absent = [head for head in heads if not found.has_head(head)]
    config: TrainingConfig = model.config
    if absent and config.head_warmup is None:
        raise InputError(
            f"{found.source} holds no {' and no '.join(absent)}, and heads that start at random "
            "spoil the backbone; set head_warmup.num_steps, the steps in which heads alone learn, "
            f"to more than optimization.freeze_prototypes_steps "
            f"{config.optimization.freeze_prototypes_steps}, or give weights with heads"
        )
    return absent
