"""Loader and parts of a batch as the settings ask for them."""

from __future__ import annotations

from dinov2_core.config.training import TrainingConfig
from dinov2_core.data.batch import PretrainBatch
from dinov2_core.data.loader import PretrainLoader
from dinov2_core.data.masking import MaskRecipe
from dinov2_core.data.shards import ShardReader
from dinov2_core.distributed.mesh import Ranks
from dinov2_core.errors import SettingsError


def mask_recipe(config: TrainingConfig) -> MaskRecipe:
    """Masks of the global crops."""
    side = config.grid_side
    return MaskRecipe(grid_height=side, grid_width=side, masking=config.masking)


def pretrain_loader(
    reader: ShardReader,
    *,
    config: TrainingConfig,
    ranks: Ranks,
    start_step: int,
    num_threads: int,
) -> PretrainLoader:
    """Batches of this rank from a step on.

    Raises:
        SettingsError: There are fewer images than a global batch needs.
    """
    batch_size = config.optimization.global_batch_size
    if batch_size > len(reader):
        raise SettingsError(
            f"optimization.global_batch_size {batch_size} is more than the {len(reader)} images "
            f"of the data set; choose at most {len(reader)}"
        )
    return PretrainLoader(
        reader,
        crops=config.crops,
        masks=mask_recipe(config),
        seed=config.seed,
        global_batch_size=batch_size,
        rank=ranks.rank,
        world_size=ranks.world_size,
        start_step=start_step,
        num_threads=num_threads,
    )


def parts_of(batch: PretrainBatch, *, config: TrainingConfig) -> tuple[PretrainBatch, ...]:
    """The batch in the parts it is computed in, padded if the settings say so."""
    parts = batch.split(config.optimization.accumulation_steps)
    if not config.execution.pads_masked_patches:
        return parts
    num_rows = mask_recipe(config).most_masked(
        parts[0].masks.shape[0], global_batch_size=config.optimization.global_batch_size
    )
    return tuple(part.padded(num_rows) for part in parts)
