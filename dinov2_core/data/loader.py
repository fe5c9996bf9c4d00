"""PretrainLoader: batches of one rank, made ahead of the optimizer by background threads."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dinov2_core.config.augmentation import Crops
from dinov2_core.data.batch import PretrainBatch
from dinov2_core.data.crops import make_crops
from dinov2_core.data.decoding import open_image
from dinov2_core.data.masking import MaskRecipe, batch_masks
from dinov2_core.data.sampler import ImageOrder, rank_positions
from dinov2_core.data.shards import ShardReader
from dinov2_core.errors import UnreadableImage


class PretrainLoader:
    """Endless batches from `start_step` on; the batch of a step depends on nothing before it.

    Resuming is starting at another step, and any number of ranks sees the same global batches.
    Iterate once; leave through `close` or the `with` statement.
    """

    def __init__(
        self,
        reader: ShardReader,
        *,
        crops: Crops,
        masks: MaskRecipe,
        seed: int,
        global_batch_size: int,
        rank: int,
        world_size: int,
        start_step: int,
        num_threads: int,
        num_prefetched: int = 2,
    ) -> None:
        """Start at a step.

        Args:
            reader: Images of the data set; stays open until the loader is closed.
            crops: Augmentation.
            masks: Masks of the global crops.
            seed: Of order, crops and masks.
            global_batch_size: Images per step over all ranks.
            rank: Of this process.
            world_size: Number of processes.
            start_step: First step to make.
            num_threads: Batches made at the same time, at least 1.
            num_prefetched: Finished batches that may wait, besides those being made.
        """
        if num_threads < 1 or num_prefetched < 0:
            raise ValueError(
                f"num_threads {num_threads} and num_prefetched {num_prefetched} make no batches; "
                "choose at least 1 and 0"
            )
        rank_positions(
            step=0, global_batch_size=global_batch_size, rank=rank, world_size=world_size
        )
        self._reader = reader
        self._crops = crops
        self._masks = masks
        self._seed = seed
        self._global_batch_size = global_batch_size
        self._rank = rank
        self._world_size = world_size
        self._order = ImageOrder(num_images=len(reader), seed=seed)
        self._next_step = start_step
        self._num_ahead = num_threads + num_prefetched
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="batches")
        self._pending: deque[Future[PretrainBatch]] = deque()
        self._is_closed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __iter__(self) -> Iterator[PretrainBatch]:
        return self

    def __next__(self) -> PretrainBatch:
        """The batch of the next step.

        Raises:
            UnreadableImage: An image of the batch does not decode; names it and its shard.
            StopIteration: The loader was closed.
        """
        if self._is_closed:
            raise StopIteration
        while len(self._pending) < self._num_ahead:
            self._pending.append(self._pool.submit(self.make_batch, self._next_step))
            self._next_step += 1
        return self._pending.popleft().result()

    def make_batch(self, step: int) -> PretrainBatch:
        """The batch of any step, made in the calling thread."""
        positions = rank_positions(
            step=step,
            global_batch_size=self._global_batch_size,
            rank=self._rank,
            world_size=self._world_size,
        )
        crops = make_crops(
            self._open_images(positions), positions, recipe=self._crops, seed=self._seed
        )
        masks = batch_masks(
            positions,
            step=step,
            global_batch_size=self._global_batch_size,
            recipe=self._masks,
            seed=self._seed,
        )
        return PretrainBatch(
            global_crops=crops.global_crops,
            local_crops=crops.local_crops,
            masks=masks.masks,
            masked_indices=masks.masked_indices,
            mask_weights=masks.mask_weights,
            num_masked=len(masks.masked_indices),
        )

    def image_names(self, step: int, *, rank: int) -> tuple[str, ...]:
        """Sha256 of the images of any step and rank, in the order of the batch."""
        positions = rank_positions(
            step=step,
            global_batch_size=self._global_batch_size,
            rank=rank,
            world_size=self._world_size,
        )
        numbers = self._order.image_at(positions).tolist()
        return tuple(entry.sha256 for entry in self._reader.entries(numbers))

    def close(self) -> None:
        """Stop the threads after the batches they are at and drop what is waiting."""
        self._is_closed = True
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._pending.clear()

    def _open_images(self, positions: NDArray[np.int64]) -> list[Image.Image]:
        return [self._open_image(number) for number in self._order.image_at(positions).tolist()]

    def _open_image(self, number: int) -> Image.Image:
        try:
            return open_image(self._reader.read(number), num_channels=self._crops.num_channels)
        except UnreadableImage as error:
            entry = self._reader.entry(number)
            raise UnreadableImage(
                f"image {entry.sha256} at offset {entry.offset} of {entry.shard} does not decode "
                f"({error}); leave it out of the data set",
                reason=error.reason,
            ) from error
