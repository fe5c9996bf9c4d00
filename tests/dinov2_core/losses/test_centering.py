import torch
import torch.nn.functional as F
from torch import Tensor

from dinov2_core.losses.centering import CenteredTargets
from tests.dinov2_core.losses.dense import dense_targets


def unit(*shape: int, seed: int) -> Tensor:
    return F.normalize(torch.randn(shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def test_each_step_uses_the_batches_before_it() -> None:
    centering = CenteredTargets(num_prototypes=11, momentum=0.9)
    center = torch.zeros(11)
    for step in range(4):
        features, prototypes = unit(6, 5, seed=step), unit(11, 5, seed=step + 10)
        logits = features @ prototypes.T
        targets = centering(features, prototypes=prototypes, temperature=0.05, chunk_size=4)
        torch.testing.assert_close(centering.center, center)
        expected = ((logits - center) / 0.05).softmax(1)
        torch.testing.assert_close(dense_targets(targets), expected, atol=1e-6, rtol=1e-5)
        center = 0.9 * center + 0.1 * logits.mean(0)


def test_a_batch_in_waiting_survives_saving() -> None:
    first, second = (CenteredTargets(num_prototypes=11, momentum=0.9) for _ in range(2))
    prototypes = unit(11, 5, seed=1)
    first(unit(6, 5, seed=0), prototypes=prototypes, temperature=0.05)
    second.load_state_dict(first.state_dict())
    for centering in (first, second):
        centering(unit(6, 5, seed=2), prototypes=prototypes, temperature=0.05)
    assert first.center.abs().max() > 0
    assert torch.equal(first.center, second.center)
    first.init_weights()
    assert not first.center.any()
    assert not first.pending.any()


def test_a_batch_without_samples_counts_as_zero_scores() -> None:
    centering = CenteredTargets(num_prototypes=11, momentum=0.9)
    targets = centering(torch.zeros(0, 5), prototypes=unit(11, 5, seed=1), temperature=0.05)
    assert dense_targets(targets).shape == (0, 11)
    assert not centering.pending.any()


def test_rows_that_only_pad_count_for_nothing() -> None:
    features, prototypes = unit(6, 5, seed=0), unit(11, 5, seed=1)
    plain, padded = (CenteredTargets(num_prototypes=11, momentum=0.9) for _ in range(2))
    for _ in range(2):
        expected = dense_targets(plain(features, prototypes=prototypes, temperature=0.05))
        targets = dense_targets(
            padded(
                torch.cat([features, features[:2]]),
                prototypes=prototypes,
                temperature=0.05,
                is_sample=torch.arange(8) < 6,
            )
        )
        torch.testing.assert_close(targets[:6], expected, atol=1e-6, rtol=0)
        assert not targets[6:].any()
