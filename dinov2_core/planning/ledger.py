"""Ledger: what the operations of a step hold, compute, move and send."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, UntypedStorage
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

_aten, _c10d = torch.ops.aten, torch.ops.c10d


def _attention_flops(query: Tensor, key: Tensor, value: Tensor, *_: object, **__: object) -> int:
    count: int = sdpa_flop_count(query.shape, key.shape, value.shape)  # type: ignore[no-untyped-call]
    return count


def _attention_backward_flops(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: object, **__: object
) -> int:
    count: int = sdpa_backward_flop_count(grad.shape, query.shape, key.shape, value.shape)  # type: ignore[no-untyped-call]
    return count


_FLOPS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    _aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
}
"""Multiply-adds count twice; the attention of CPUs stands for that of any fused kernel."""

_UNWRITTEN = {_aten.empty, _aten.empty_strided, _aten.empty_like, _aten.new_empty}
"""Ask for memory without touching it."""

_COLLECTIVES = {
    _c10d._allgather_base_.default: "all_gather",
    _c10d.allgather_.default: "all_gather",
    _c10d._reduce_scatter_base_.default: "reduce_scatter",
    _c10d.allreduce_.default: "all_reduce",
}


@dataclass(slots=True)
class _Block:
    """A piece of memory that is alive."""

    size_bytes: int
    purpose: str
    watch: weakref.ref[UntypedStorage]


class Ledger(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows every operation inside `with`, on real tensors or on fake ones without data.

    Memory is what tensors' storages hold, resized ones included, as an allocator would be asked
    for it: without rounding, fragments, and what kernels use inside. On fake tensors the few
    numbers that the step reads from the device get stand-ins: rows of other ranks are as many as
    this rank's, all else is 1.

    Args:
        rows: Stands for every integer that is read from a fake tensor.
    """

    def __init__(self, *, rows: int = 1) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.purpose = "other"
        """What memory that is asked for from now on is for."""
        self.held_bytes: Counter[str] = Counter()
        """By purpose, now."""
        self.peak_bytes = 0
        """Most that was held at once."""
        self.peak: dict[str, int] = {}
        """Bytes by purpose at that moment."""
        self.flops: Counter[str] = Counter()
        """Floating-point operations of matrix products and convolutions, by type of the factors."""
        self.moved_bytes = 0
        """Read and written by everything else."""
        self.sent: Counter[str] = Counter()
        """Bytes of the whole tensor, all ranks' parts together, by kind of collective."""
        self.calls: Counter[str] = Counter()
        """Calls by kind of collective."""
        self._rows = rows
        self._is_aside = False
        """Whether DTensor tries an operation on whole tensors, to know the shape of its result."""
        self._blocks: dict[int, _Block] = {}
        self._total = 0

    def __enter__(self) -> Self:
        self._resize = resize = UntypedStorage.resize_
        self._foresee = foresee = ShardingPropagator._propagate_tensor_meta_non_cached

        def followed(storage: UntypedStorage, size: int) -> None:
            resize(storage, size)
            self._follow(storage)

        def aside(propagator: ShardingPropagator, schema: Any) -> Any:
            self._is_aside = True
            try:
                return foresee(propagator, schema)
            finally:
                self._is_aside = False

        UntypedStorage.resize_ = followed  # type: ignore[method-assign,assignment]
        ShardingPropagator._propagate_tensor_meta_non_cached = aside  # type: ignore[method-assign,assignment]
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: object) -> None:
        UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]
        ShardingPropagator._propagate_tensor_meta_non_cached = self._foresee  # type: ignore[method-assign]
        super().__exit__(*error)  # type: ignore[no-untyped-call]

    def claim(self, tensors: Iterable[Tensor], purpose: str) -> None:
        """Say what memory that exists is for."""
        for tensor in tensors:
            local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            self._follow(local.untyped_storage(), purpose=purpose)

    def restart(self) -> None:
        """Forget all that was counted; what is held stays."""
        self.peak_bytes, self.peak, self.moved_bytes = 0, {}, 0
        for counter in (self.flops, self.sent, self.calls):
            counter.clear()
        self._note_peak()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        """Run one operation and write down what it did; DTensors come back part by part."""
        kwargs = kwargs or {}
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented
        if func is _aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return self._stand_in(args[0].dtype)
        out = func(*args, **kwargs)
        if self._is_aside or func.is_view or func.namespace == "prim":
            return out
        outputs = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        for tensor in outputs:
            self._follow(tensor.untyped_storage())
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if func in _COLLECTIVES:
            self._send(_COLLECTIVES[func], inputs)
        elif func.namespace == "fsdp":
            self._name_gathered(func, outputs=outputs, inputs=inputs)
        flops = _FLOPS.get(func._overloadpacket)
        if flops is not None:
            count = flops(*args, **kwargs, out_val=out)
            self.flops[str(inputs[0].dtype).removeprefix("torch.")] += count
        elif func._overloadpacket not in _UNWRITTEN:
            self.moved_bytes += sum(map(_num_bytes, inputs)) + sum(map(_num_bytes, outputs))
        return out

    def _stand_in(self, dtype: torch.dtype) -> bool | int | float:
        if dtype == torch.bool:
            return True
        return 1.0 if dtype.is_floating_point else self._rows

    def _send(self, kind: str, inputs: list[Tensor]) -> None:
        self.calls[kind] += 1
        self.sent[kind] += max(map(_num_bytes, inputs))

    def _name_gathered(self, func: Any, *, outputs: list[Tensor], inputs: list[Tensor]) -> None:
        """Buffers of sharding: gathered parameters on the way in, gradients on the way out."""
        purpose = "gradients" if "chunk_cat" in str(func) else "gathered parameters"
        for tensor in (*outputs, *inputs):
            block = self._blocks.get(tensor.untyped_storage()._cdata)
            if block is not None and block.purpose not in PERSISTENT:
                self._follow(tensor.untyped_storage(), purpose=purpose)

    def _follow(self, storage: UntypedStorage, *, purpose: str | None = None) -> None:
        key, size = storage._cdata, storage.nbytes()
        block = self._blocks.get(key)
        if block is None:
            if size == 0:
                return
            watch = weakref.ref(storage, lambda _: self._release(key))
            block = self._blocks[key] = _Block(0, purpose or self.purpose, watch)
        purpose = purpose or block.purpose
        if size == block.size_bytes and purpose == block.purpose:
            return
        self.held_bytes[block.purpose] -= block.size_bytes
        self.held_bytes[purpose] += size
        self._total += size - block.size_bytes
        block.size_bytes, block.purpose = size, purpose
        self._note_peak()

    def _release(self, key: int) -> None:
        block = self._blocks.pop(key)
        self.held_bytes[block.purpose] -= block.size_bytes
        self._total -= block.size_bytes

    def _note_peak(self) -> None:
        if self._total > self.peak_bytes:
            self.peak_bytes, self.peak = self._total, dict(+self.held_bytes)


PERSISTENT = ("student", "teacher", "optimizer")
"""Purposes of what outlives a step."""


def _num_bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
