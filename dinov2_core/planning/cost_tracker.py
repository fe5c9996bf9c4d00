"""Memory, work and traffic of a step's operations."""

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
"""Multiply-adds count twice; the attention of CPUs counts like any fused kernel."""

_UNWRITTEN = {_aten.empty, _aten.empty_strided, _aten.empty_like, _aten.new_empty}
"""Allocate memory without touching it."""

_COLLECTIVES = {
    _c10d._allgather_base_.default: "all_gather",
    _c10d.allgather_.default: "all_gather",
    _c10d._reduce_scatter_base_.default: "reduce_scatter",
    _c10d.allreduce_.default: "all_reduce",
}


@dataclass(slots=True)
class _Storage:
    """Memory that is held."""

    size_bytes: int
    purpose: str
    reference: weakref.ref[UntypedStorage]


@dataclass(slots=True)
class Segment:
    """A part of a step, and the most memory that is held during it."""

    purpose: str
    peak_bytes: int
    memory_bytes: dict[str, int]
    """The same by purpose."""


class CostTracker(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows every operation inside `with`, on real tensors or on fake ones without data.

    Memory is what tensors' storages hold, resized ones included, as it is requested from an
    allocator: without rounding, fragments, and what kernels use inside. On fake tensors the few
    numbers that the step reads from the device are replaced: rows of other ranks are as many as
    this rank's, all else is 1.

    Args:
        rows: Replaces every integer that is read from a fake tensor.
    """

    def __init__(self, *, rows: int = 1) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.held_bytes: Counter[str] = Counter()
        """By purpose, now."""
        self.segments: list[Segment] = []
        """Since the last restart; the last one is not finished."""
        self.flops: Counter[str] = Counter()
        """Floating-point operations of matrix products and convolutions, by type of the factors."""
        self.moved_bytes = 0
        """Read and written by everything else."""
        self.sent: Counter[str] = Counter()
        """Bytes of the whole tensor, all ranks' parts together, by kind of collective."""
        self.calls: Counter[str] = Counter()
        """Calls by kind of collective."""
        self._rows = rows
        self._is_propagating = False
        """Whether DTensor tries an operation on whole tensors, to know the shape of its result."""
        self._storages: dict[int, _Storage] = {}
        self._total = 0
        self.restart("other")

    def __enter__(self) -> Self:
        self._resize = resize = UntypedStorage.resize_
        self._propagate = propagate = ShardingPropagator._propagate_tensor_meta_non_cached

        def tracked(storage: UntypedStorage, size: int) -> None:
            resize(storage, size)
            self._track(storage)

        def untracked(propagator: ShardingPropagator, schema: Any) -> Any:
            self._is_propagating = True
            try:
                return propagate(propagator, schema)
            finally:
                self._is_propagating = False

        UntypedStorage.resize_ = tracked  # type: ignore[method-assign,assignment]
        ShardingPropagator._propagate_tensor_meta_non_cached = untracked  # type: ignore[method-assign,assignment]
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: object) -> None:
        UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]
        ShardingPropagator._propagate_tensor_meta_non_cached = self._propagate  # type: ignore[method-assign]
        super().__exit__(*error)  # type: ignore[no-untyped-call]

    @property
    def peak(self) -> Segment:
        """The segment that holds the most, the first of equals."""
        return max(self.segments, key=lambda segment: segment.peak_bytes)

    def begin_segment(self, purpose: str = "") -> None:
        """Start a segment; memory allocated from now on has this purpose, or that of before."""
        purpose = purpose or self.segments[-1].purpose
        self.segments.append(Segment(purpose, self._total, self._memory()))

    def tag(self, tensors: Iterable[Tensor], purpose: str) -> None:
        """Set the purpose of memory that is held."""
        for tensor in tensors:
            local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            self._track(local.untyped_storage(), purpose=purpose)

    def restart(self, purpose: str) -> None:
        """Set all counts to zero and start a first segment; what is held stays."""
        self.moved_bytes = 0
        for counter in (self.flops, self.sent, self.calls):
            counter.clear()
        self.segments = [Segment(purpose, self._total, self._memory())]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        """Run one operation and count it; DTensors come back part by part."""
        kwargs = kwargs or {}
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented
        if isinstance(args[0] if args else None, FakeTensor):
            if func is torch.ops.prim.device.default and not args[0].fake_mode.in_kernel_invocation:
                return args[0].fake_device  # the most frequent operation
            if func is _aten._local_scalar_dense.default:
                return self._replacement(args[0].dtype)
        out = func(*args, **kwargs)
        if self._is_propagating or func.is_view or func.namespace == "prim":
            return out
        outputs = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        for tensor in outputs:
            self._track(tensor.untyped_storage())
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if func in _COLLECTIVES:
            self._count_collective(_COLLECTIVES[func], inputs)
        elif func.namespace == "fsdp":
            self._tag_sharding_buffers(func, outputs=outputs, inputs=inputs)
        flops = _FLOPS.get(func._overloadpacket)
        if flops is not None:
            count = flops(*args, **kwargs, out_val=out)
            self.flops[str(inputs[0].dtype).removeprefix("torch.")] += count
        elif func._overloadpacket not in _UNWRITTEN:
            self.moved_bytes += sum(map(_num_bytes, inputs)) + sum(map(_num_bytes, outputs))
        return out

    def _replacement(self, dtype: torch.dtype) -> bool | int | float:
        if dtype == torch.bool:
            return True
        return 1.0 if dtype.is_floating_point else self._rows

    def _count_collective(self, kind: str, inputs: list[Tensor]) -> None:
        self.calls[kind] += 1
        self.sent[kind] += max(map(_num_bytes, inputs))

    def _tag_sharding_buffers(
        self, func: Any, *, outputs: list[Tensor], inputs: list[Tensor]
    ) -> None:
        """Gathered parameters before a part of the model runs, gradients after it."""
        purpose = "gradients" if "chunk_cat" in str(func) else "gathered parameters"
        for tensor in (*outputs, *inputs):
            held = self._storages.get(tensor.untyped_storage()._cdata)
            if held is not None and held.purpose not in PERSISTENT:
                self._track(tensor.untyped_storage(), purpose=purpose)

    def _track(self, storage: UntypedStorage, *, purpose: str | None = None) -> None:
        key, size = storage._cdata, storage.nbytes()
        held = self._storages.get(key)
        if held is None:
            if size == 0:
                return
            reference = weakref.ref(storage, lambda _: self._release(key))
            held = _Storage(0, purpose or self.segments[-1].purpose, reference)
            self._storages[key] = held
        purpose = purpose or held.purpose
        if size == held.size_bytes and purpose == held.purpose:
            return
        self.held_bytes[held.purpose] -= held.size_bytes
        self.held_bytes[purpose] += size
        self._total += size - held.size_bytes
        held.size_bytes, held.purpose = size, purpose
        segment = self.segments[-1]
        if self._total > segment.peak_bytes:
            segment.peak_bytes, segment.memory_bytes = self._total, self._memory()

    def _release(self, key: int) -> None:
        held = self._storages.pop(key)
        self.held_bytes[held.purpose] -= held.size_bytes
        self._total -= held.size_bytes

    def _memory(self) -> dict[str, int]:
        return dict(+self.held_bytes)


PERSISTENT = ("student", "teacher", "optimizer")
"""Purposes of what outlives a step."""


def _num_bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
