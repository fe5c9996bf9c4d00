from __future__ import annotations

import torch
from torch import nn

from dinov2_core.planning.ledger import Ledger

MIB = 2**20


def megabytes(count: int) -> torch.Tensor:
    return torch.zeros(count * MIB // 4)


def test_memory_counts_once_per_storage_until_it_is_released() -> None:
    with Ledger() as ledger:
        kept = megabytes(2)
        gone = megabytes(3)
        view = kept.view(2, -1)
        assert ledger.peak_bytes == 5 * MIB
        del gone, kept
        assert sum(ledger.held_bytes.values()) == 2 * MIB
        del view
        assert sum(ledger.held_bytes.values()) == 0
    assert ledger.peak_bytes == 5 * MIB


def test_a_peak_is_told_by_purpose() -> None:
    weights = megabytes(4)
    with Ledger() as ledger:
        ledger.claim([weights], "student")
        ledger.purpose = "activations"
        activations = megabytes(1)
    assert ledger.peak == {"student": 4 * MIB, "activations": MIB}
    del activations


def test_resized_storages_are_followed() -> None:
    with Ledger() as ledger:
        buffer = megabytes(4)
        buffer.untyped_storage().resize_(0)
        assert sum(ledger.held_bytes.values()) == 0
        buffer.untyped_storage().resize_(MIB)
        assert sum(ledger.held_bytes.values()) == MIB


def test_resizing_is_as_before_afterwards() -> None:
    before = torch.UntypedStorage.resize_
    with Ledger():
        assert torch.UntypedStorage.resize_ is not before
    assert torch.UntypedStorage.resize_ is before


def test_products_count_as_work_and_the_rest_as_traffic() -> None:
    with Ledger() as ledger:
        left, right = torch.zeros(8, 16), torch.zeros(16, 32)
        ledger.restart()
        product = left @ right
        assert ledger.flops == {"float32": 2 * 8 * 16 * 32}
        assert ledger.moved_bytes == 0
        product.add_(1)
    assert ledger.moved_bytes == 2 * product.numel() * 4


def test_attention_of_cpus_counts_as_fused_attention_does() -> None:
    shape = (2, 3, 8, 16)
    query = torch.zeros(shape, requires_grad=True)
    with Ledger() as ledger:
        out = nn.functional.scaled_dot_product_attention(query, query, query)
        products = 2 * (2 * 3 * 8 * 8 * 16) * 2
        assert ledger.flops["float32"] == products
        out.sum().backward()
    assert ledger.flops["float32"] == products + 5 * products // 2
