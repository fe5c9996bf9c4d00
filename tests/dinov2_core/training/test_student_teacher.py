import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from dinov2_core.config.backbone import Backbone, Dimensions
from dinov2_core.config.objectives import (
    DinoObjective,
    Head,
    IbotObjective,
    KoleoObjective,
    SharedHead,
    SinkhornKnopp,
    SoftmaxCentering,
)
from dinov2_core.config.training import Crops, TrainingConfig
from dinov2_core.data.batch import PretrainBatch
from dinov2_core.training.accumulation import accumulate_gradients
from dinov2_core.training.objective import Losses
from dinov2_core.training.student_teacher import StudentTeacher

NUM_IMAGES, NUM_PATCHES = 4, 4
HEAD = Head(num_prototypes=24, bottleneck_dim=8, hidden_dim=16)


def make_config(
    *,
    is_shared: bool = False,
    centering: SinkhornKnopp | SoftmaxCentering = SinkhornKnopp(),  # noqa: B008
    koleo: KoleoObjective | None = KoleoObjective(),  # noqa: B008
    num_local_crops: int = 3,
) -> TrainingConfig:
    own = Head(num_prototypes=20, bottleneck_dim=6, hidden_dim=16)
    return TrainingConfig(
        backbone=Backbone(
            architecture=Dimensions(embed_dim=16, depth=2, num_heads=2),
            patch_size_pixels=4,
            num_register_tokens=1,
            layer_scale=0.3,
            drop_path_rate=0.0,
        ),
        crops=Crops(
            global_crop_size_pixels=8, local_crop_size_pixels=4, num_local_crops=num_local_crops
        ),
        dino=DinoObjective(head=HEAD),
        ibot=IbotObjective(head=SharedHead() if is_shared else own),
        koleo=koleo,
        centering=centering,
        precision="fp32",
    )


def make_model(config: TrainingConfig) -> StudentTeacher:
    model = StudentTeacher(config, image_size_pixels=8).train()
    generator = torch.Generator().manual_seed(0)
    model.init_weights(generator)
    with torch.no_grad():  # away from the start, where all cls tokens are nearly equal
        for parameter in model.student.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
        for parameter in model.teacher.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return model


def make_batch(*, images: slice = slice(0, NUM_IMAGES), num_local_crops: int = 3) -> PretrainBatch:
    """A batch of some of the images; together the shares make up the whole batch."""
    generator = torch.Generator().manual_seed(1)
    global_crops = torch.randn(2, NUM_IMAGES, 3, 8, 8, generator=generator)[:, images]
    local_crops = torch.randn(num_local_crops, NUM_IMAGES, 3, 4, 4, generator=generator)[:, images]
    masks = torch.rand(2, NUM_IMAGES, NUM_PATCHES, generator=generator) < 0.4
    masks[0, 0] = False
    masks = masks[:, images].flatten(0, 1)
    masked_indices = masks.flatten().nonzero().flatten()
    weights = (1 / masks.sum(1).clamp(min=1))[:, None].expand_as(masks)[masks]
    return PretrainBatch(
        global_crops=global_crops.flatten(0, 1),
        local_crops=local_crops.flatten(0, 1),
        masks=masks,
        masked_indices=masked_indices,
        mask_weights=weights,
        num_masked=len(masked_indices),
    )


def take_gradients(model: StudentTeacher, batch: PretrainBatch) -> Losses:
    return accumulate_gradients(model, [batch], teacher_temperature=0.05)


def cross_entropy(targets: Tensor, logits: Tensor) -> Tensor:
    return -(targets * (logits / 0.1).log_softmax(1)).sum(1)


def dense_sinkhorn(logits: Tensor) -> Tensor:
    targets = (logits / 0.05).exp()
    for _ in range(3):
        targets = targets / targets.sum(0)
        targets = targets / targets.sum(1, keepdim=True)
    return targets


def naive_total(model: StudentTeacher, batch: PretrainBatch) -> Tensor:
    """The objective with one forward per crop and whole matrices of scores."""
    student, teacher = model.student, model.teacher
    ibot_heads = [x.ibot_head or x.dino_head for x in (student, teacher)]
    crops = [*batch.global_crops.chunk(2), *batch.local_crops.chunk(3)]
    masks: list[Tensor | None] = [*batch.masks.chunk(2), None, None, None]
    features = [student.backbone([c], masks=[m])[0] for c, m in zip(crops, masks, strict=True)]
    with torch.no_grad():
        teacher_features = [teacher.backbone.features(crop) for crop in crops[:2]]
        cls = torch.cat([f.cls for f in teacher_features])
        targets = dense_sinkhorn(teacher.dino_head(cls).logits()).chunk(2)
        patches = torch.cat([f.patches for f in teacher_features])[batch.masks]
        patch_targets = dense_sinkhorn(ibot_heads[1](patches).logits())
    total = torch.zeros(())
    for s, crop in enumerate(features):
        logits = student.dino_head(crop.cls).logits()
        for t in range(2):
            if s != t:
                total = total + cross_entropy(targets[t], logits).mean() / 8
    patches = torch.cat([f.patches for f in features[:2]])[batch.masks]
    patch_loss = cross_entropy(patch_targets, ibot_heads[0](patches).logits())
    total = total + (patch_loss * batch.mask_weights).sum() / len(batch.masks)
    for crop in features[:2]:
        points = torch.nn.functional.normalize(crop.cls, dim=1)
        distances = torch.cdist(points, points) + 10 * torch.eye(len(points))
        total = total - 0.1 * distances.min(1).values.log().mean()
    return total


@pytest.mark.parametrize("is_shared", [True, False])
def test_total_and_gradients_equal_the_objective_written_out(is_shared: bool) -> None:
    model, batch = make_model(make_config(is_shared=is_shared)), make_batch()
    losses = take_gradients(model, batch)
    expected = naive_total(model, batch)
    torch.testing.assert_close(losses.total, expected, atol=0, rtol=1e-6)
    assert list(losses.terms) == ["dino_local", "dino_global", "koleo", "ibot"]
    torch.testing.assert_close(losses.total, torch.stack(list(losses.terms.values())).sum())
    parameters = dict(model.student.named_parameters())
    naive_grads = torch.autograd.grad(expected, list(parameters.values()))
    for (name, parameter), naive in zip(parameters.items(), naive_grads, strict=True):
        assert parameter.grad is not None
        assert (parameter.grad - naive).norm() <= 2e-5 * naive.norm() + 1e-7, name


def test_only_the_student_learns() -> None:
    model = make_model(make_config())
    take_gradients(model, make_batch())
    assert all(p.grad is not None for p in model.student.parameters())
    assert all(p.grad is None and not p.requires_grad for p in model.teacher.parameters())


@pytest.mark.parametrize("centering", [SinkhornKnopp(), SoftmaxCentering()])
def test_batches_without_masked_patches_or_local_crops_are_whole(
    centering: SinkhornKnopp | SoftmaxCentering,
) -> None:
    config = make_config(centering=centering, koleo=None, num_local_crops=0)
    model, full = make_model(config), make_batch(num_local_crops=0)
    batch = PretrainBatch(
        global_crops=full.global_crops,
        local_crops=full.local_crops,
        masks=torch.zeros_like(full.masks),
        masked_indices=full.masked_indices[:0],
        mask_weights=full.mask_weights[:0],
        num_masked=0,
    )
    terms = take_gradients(model, batch).terms
    assert terms["ibot"] == terms["koleo"] == terms["dino_local"] == 0
    assert terms["dino_global"] > 0
    grads = [p.grad for p in model.student.parameters() if p.grad is not None]
    assert all(torch.isfinite(grad).all() for grad in grads)


def test_health_numbers_are_in_range() -> None:
    losses = take_gradients(make_model(make_config()), make_batch())
    assert 0 < losses.teacher_entropy <= torch.log(torch.tensor(24.0))
    assert 1 / (2 * NUM_IMAGES) <= losses.prototype_usage <= 1


def test_teacher_starts_equal_and_follows_with_momentum() -> None:
    model = StudentTeacher(make_config(), image_size_pixels=8)
    for student, teacher in zip(
        model.student.parameters(), model.teacher.parameters(), strict=True
    ):
        assert torch.equal(student, teacher)
    model = make_model(make_config())
    before = copy.deepcopy(model.teacher.state_dict())
    model.update_teacher(0.9)
    for name, value in model.teacher.state_dict().items():
        student = model.student.state_dict()[name]
        torch.testing.assert_close(value, 0.9 * before[name] + 0.1 * student)


def test_teacher_stays_in_eval_mode() -> None:
    model = make_model(make_config())
    assert model.student.training
    assert not any(module.training for module in model.teacher.modules())
    assert not model.eval().student.training


def test_every_submodule_is_clipped_apart() -> None:
    model = make_model(make_config())
    take_gradients(model, make_batch())
    expected = {
        name: torch.cat([p.grad.flatten() for p in part.parameters() if p.grad is not None]).norm()
        for name, part in model.student.named_children()
    }
    limit = float(sorted(expected.values())[1])  # the middle one and the smallest stay
    norms = model.clip_gradients(limit)
    assert norms.keys() == {"backbone", "dino_head", "ibot_head"}
    torch.testing.assert_close(norms, expected)
    again = model.clip_gradients(1e9)
    for name, norm in again.items():
        assert norm.item() == pytest.approx(min(expected[name].item(), limit), rel=1e-5)


def test_shared_head_is_clipped_once() -> None:
    model = make_model(make_config(is_shared=True))
    take_gradients(model, make_batch())
    assert model.clip_gradients(3.0).keys() == {"backbone", "dino_head"}


def test_meta_device_model_is_initialised_whole() -> None:
    with torch.device("meta"):
        model = StudentTeacher(make_config(centering=SoftmaxCentering()), image_size_pixels=8)
    model.to_empty(device="cpu")
    model.init_weights(torch.Generator().manual_seed(0))
    again = StudentTeacher(make_config(centering=SoftmaxCentering()), image_size_pixels=8)
    again.init_weights(torch.Generator().manual_seed(0))
    for name, value in again.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def two_steps(model: StudentTeacher, batch: PretrainBatch) -> dict[str, Any]:
    """Losses, norms and parameters of two steps; the second sees the teacher after its update."""
    optimizer = torch.optim.SGD(model.student.parameters(), lr=0.5)
    totals, norms = [], {}
    for _ in range(2):
        optimizer.zero_grad()
        losses = take_gradients(model, batch)
        norms = model.clip_gradients(1.0)
        optimizer.step()
        model.update_teacher(0.5)
        totals.append(losses.total)
    parameters = {name: whole(value.detach()) for name, value in model.named_parameters()}
    return {"totals": torch.stack(totals), "norms": norms, "parameters": parameters}


def shard(model: StudentTeacher, *, reshards_teacher: bool) -> None:
    for part, reshards in ((model.student, False), (model.teacher, reshards_teacher)):
        for block in part.backbone.blocks:
            fully_shard(block)
        for module in part.children():
            fully_shard(module, reshard_after_forward=reshards)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    directory = tmp_path_factory.mktemp("ranks")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen([sys.executable, __file__, str(rank), str(directory)], env=environment)
        for rank in range(2)
    ]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    return [torch.load(directory / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("teacher", ["reshards", "keeps_gathered"])
def test_two_sharded_ranks_equal_one_process(ranks: list[dict[str, Any]], teacher: str) -> None:
    expected = two_steps(make_model(make_config()), make_batch())
    shares = [rank[teacher] for rank in ranks]
    totals = (shares[0]["totals"] + shares[1]["totals"]) / 2
    torch.testing.assert_close(totals, expected["totals"], atol=0, rtol=1e-5)
    for share in shares:
        for name, norm in expected["norms"].items():
            torch.testing.assert_close(share["norms"][name], norm, atol=0, rtol=1e-4)
        for name, value in expected["parameters"].items():
            torch.testing.assert_close(share["parameters"][name], value, atol=1e-5, rtol=1e-4)


def run_rank(rank: int, directory: Path) -> None:
    store = dist.FileStore(str(directory / "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    batch = make_batch(images=slice(0, 2) if rank == 0 else slice(2, NUM_IMAGES))
    results = {}
    for teacher in ("reshards", "keeps_gathered"):
        model = make_model(make_config())
        shard(model, reshards_teacher=teacher == "reshards")
        results[teacher] = two_steps(model, batch)
    torch.save(results, directory / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    run_rank(int(sys.argv[1]), Path(sys.argv[2]))
