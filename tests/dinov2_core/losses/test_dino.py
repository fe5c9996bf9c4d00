import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dinov2_core.losses.dino import dino_losses
from dinov2_core.losses.sinkhorn import sinkhorn_knopp


def unit(*shape: int, seed: int) -> Tensor:
    return F.normalize(torch.randn(shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


@pytest.mark.parametrize("num_local_crops", [0, 1, 8])
def test_loss_is_the_mean_over_all_pairs_of_different_crops(num_local_crops: int) -> None:
    num_images = 3
    global_features = unit(2 * num_images, 5, seed=0).requires_grad_()
    local_features = unit(num_local_crops * num_images, 5, seed=1).requires_grad_()
    prototypes = (1.2 * unit(17, 5, seed=2)).requires_grad_()
    assignments = sinkhorn_knopp(
        unit(2 * num_images, 5, seed=3),
        prototypes=unit(17, 5, seed=4),
        temperature=0.07,
        num_iterations=3,
    )
    losses = dino_losses(
        assignments,
        global_features=global_features,
        local_features=local_features,
        prototypes=prototypes,
        student_temperature=0.1,
        chunk_size=6,
    )
    crops = [*global_features.split(num_images)]
    crops += [*local_features.split(num_images)] if num_local_crops else []
    targets = assignments.dense().double().split(num_images)
    terms = {"global": torch.zeros((), dtype=torch.float64), "local": torch.zeros(())}
    num_pairs = 0
    for teacher in range(2):
        for student, crop in enumerate(crops):
            if student == teacher:
                continue
            log_probabilities = (crop.double() @ prototypes.double().T / 0.1).log_softmax(1)
            pair = -(targets[teacher] * log_probabilities).sum(1).mean()
            kind = "global" if student < 2 else "local"
            terms[kind] = terms[kind] + pair
            num_pairs += 1
    expected = {kind: (term / num_pairs).float() for kind, term in terms.items()}
    torch.testing.assert_close(losses.global_crops, expected["global"], atol=0, rtol=1e-6)
    torch.testing.assert_close(losses.local_crops, expected["local"], atol=0, rtol=1e-6)
    inputs = (global_features, local_features, prototypes)
    grads = torch.autograd.grad(losses.global_crops + losses.local_crops, inputs)
    dense_grads = torch.autograd.grad(
        (terms["global"] + terms["local"]) / num_pairs, inputs, materialize_grads=True
    )
    for grad, dense in zip(grads, dense_grads, strict=True):
        assert (grad - dense).norm() <= 1e-5 * dense.norm()
