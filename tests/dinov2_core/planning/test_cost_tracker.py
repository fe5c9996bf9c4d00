from __future__ import annotations

import torch
from torch import nn

from dinov2_core.planning.cost_tracker import CostTracker

MIB = 2**20


def megabytes(count: int) -> torch.Tensor:
    return torch.zeros(count * MIB // 4)


def test_memory_counts_once_per_storage_until_it_is_released() -> None:
    with CostTracker() as tracker:
        kept = megabytes(2)
        gone = megabytes(3)
        view = kept.view(2, -1)
        assert tracker.peak.peak_bytes == 5 * MIB
        del gone, kept
        assert sum(tracker.held_bytes.values()) == 2 * MIB
        del view
        assert sum(tracker.held_bytes.values()) == 0
    assert tracker.peak.peak_bytes == 5 * MIB


def test_a_peak_is_known_by_purpose() -> None:
    weights = megabytes(4)
    with CostTracker() as tracker:
        tracker.tag([weights], "student")
        tracker.begin_segment("activations")
        activations = megabytes(1)
    assert tracker.peak.memory_bytes == {"student": 4 * MIB, "activations": MIB}
    del activations


def test_resized_storages_are_followed() -> None:
    with CostTracker() as tracker:
        buffer = megabytes(4)
        buffer.untyped_storage().resize_(0)
        assert sum(tracker.held_bytes.values()) == 0
        buffer.untyped_storage().resize_(MIB)
        assert sum(tracker.held_bytes.values()) == MIB


def test_resizing_is_as_before_afterwards() -> None:
    before = torch.UntypedStorage.resize_
    with CostTracker():
        assert torch.UntypedStorage.resize_ is not before
    assert torch.UntypedStorage.resize_ is before


def test_products_count_as_work_and_the_rest_as_traffic() -> None:
    with CostTracker() as tracker:
        left, right = torch.zeros(8, 16), torch.zeros(16, 32)
        tracker.restart("other")
        product = left @ right
        assert tracker.flops == {"float32": 2 * 8 * 16 * 32}
        assert tracker.moved_bytes == 0
        product.add_(1)
    assert tracker.moved_bytes == 2 * product.numel() * 4


def test_attention_of_cpus_counts_as_fused_attention_does() -> None:
    shape = (2, 3, 8, 16)
    query = torch.zeros(shape, requires_grad=True)
    with CostTracker() as tracker:
        out = nn.functional.scaled_dot_product_attention(query, query, query)
        products = 2 * (2 * 3 * 8 * 8 * 16) * 2
        assert tracker.flops["float32"] == products
        out.sum().backward()
    assert tracker.flops["float32"] == products + 5 * products // 2
