import torch
import torch.nn.functional as F
from torch import Tensor

from dinov2_core.losses.centering import CenteredTargets
from dinov2_core.losses.ibot import ibot_loss
from dinov2_core.losses.terms import LossInputs, Predictions
from tests.dinov2_core.losses.dense import dense_targets


def unit(*shape: int, seed: int) -> Tensor:
    return F.normalize(torch.randn(shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def test_loss_is_the_mean_over_crops_of_the_mean_over_their_masked_patches() -> None:
    num_masked = [3, 0, 5, 1]
    features = unit(9, 5, seed=0).requires_grad_()
    prototypes = unit(17, 5, seed=1).requires_grad_()
    centering = CenteredTargets(num_prototypes=17, momentum=0.9)
    targets = centering(unit(9, 5, seed=2), prototypes=unit(17, 5, seed=3), temperature=0.05)
    weights = torch.cat([torch.full((n,), 1 / n) for n in num_masked if n])
    predictions = Predictions(features=features, prototypes=prototypes, targets=targets)
    inputs = LossInputs(
        global_crops=torch.zeros(4, 3, 4, 4),
        cls_tokens=torch.zeros(4, 5),
        patch_tokens=torch.zeros(4, 1, 5),
        cls=predictions,
        patches=predictions,
        mask_weights=weights,
    )
    loss = ibot_loss(inputs, student_temperature=0.1)["ibot"]
    log_probabilities = (features.double() @ prototypes.double().T / 0.1).log_softmax(1)
    cross_entropy = -(dense_targets(targets).double() * log_probabilities).sum(1)
    of_crops = [x.mean() if x.numel() else x.sum() for x in cross_entropy.split(num_masked)]
    expected = torch.stack(of_crops).mean()
    assert abs(loss.item() - expected.item()) <= 1e-6 * expected.item()
    grads = torch.autograd.grad(loss, (features, prototypes))
    dense_grads = torch.autograd.grad(expected, (features, prototypes))
    for grad, dense in zip(grads, dense_grads, strict=True):
        assert (grad - dense).norm() <= 1e-5 * dense.norm()
