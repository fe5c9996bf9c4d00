import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dinov2_core.losses.dino import dino_loss
from dinov2_core.losses.sinkhorn import sinkhorn_knopp
from dinov2_core.losses.terms import LossInputs, Predictions
from tests.dinov2_core.losses.dense import dense_targets


def unit(*shape: int, seed: int) -> Tensor:
    return F.normalize(torch.randn(shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


@pytest.mark.parametrize("num_local_crops", [0, 1, 8])
def test_loss_is_the_mean_over_all_pairs_of_different_crops(num_local_crops: int) -> None:
    num_images = 3
    features = unit((num_local_crops + 2) * num_images, 5, seed=0).requires_grad_()
    prototypes = (1.2 * unit(17, 5, seed=2)).requires_grad_()
    assignments = sinkhorn_knopp(
        unit(2 * num_images, 5, seed=3),
        prototypes=unit(17, 5, seed=4),
        temperature=0.07,
        num_iterations=3,
    )
    predictions = Predictions(features=features, prototypes=prototypes, targets=assignments)
    losses = dino_loss(
        LossInputs(
            global_crops=torch.zeros(2 * num_images, 3, 4, 4),
            cls_tokens=features[-2 * num_images :],
            patch_tokens=torch.zeros(2 * num_images, 1, 5),
            cls=predictions,
            patches=predictions,
            mask_weights=torch.zeros(0),
        ),
        student_temperature=0.1,
    )
    *local_crops, first, second = features.split(num_images)
    targets = dense_targets(assignments).double().split(num_images)
    terms = {"global": torch.zeros((), dtype=torch.float64), "local": torch.zeros(())}
    num_pairs = 0
    for teacher in range(2):
        for student, crop in enumerate([first, second, *local_crops]):
            if student == teacher:
                continue
            log_probabilities = (crop.double() @ prototypes.double().T / 0.1).log_softmax(1)
            pair = -(targets[teacher] * log_probabilities).sum(1).mean()
            kind = "global" if student < 2 else "local"
            terms[kind] = terms[kind] + pair
            num_pairs += 1
    expected = {kind: (term / num_pairs).float() for kind, term in terms.items()}
    torch.testing.assert_close(losses["dino_global"], expected["global"], atol=0, rtol=1e-6)
    torch.testing.assert_close(losses["dino_local"], expected["local"], atol=0, rtol=1e-6)
    grads = torch.autograd.grad(sum(losses.values()), (features, prototypes))
    dense_grads = torch.autograd.grad(
        (terms["global"] + terms["local"]) / num_pairs, (features, prototypes)
    )
    for grad, expected_grad in zip(grads, dense_grads, strict=True):
        assert (grad - expected_grad).norm() <= 1e-5 * expected_grad.norm()
