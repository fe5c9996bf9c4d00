"""crops: boxes as torchvision draws them, colours with the given probabilities."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from dinov2_core.config.augmentation import Crops
from dinov2_core.data.crops import (
    augment_colors,
    crop_boxes,
    make_crops,
    random_resized_boxes,
)
from dinov2_core.data.randomness import Stream, hashed_uniforms

RECIPE = Crops(num_local_crops=3)


def replace(recipe: Crops, **changes: object) -> Crops:
    return recipe.model_copy(update=changes)


PLAIN = replace(
    RECIPE,
    horizontal_flip_probability=0.0,
    color_jitter_probability=0.0,
    grayscale_probability=0.0,
    blur_probabilities=(0.0, 0.0, 0.0),
    solarize_probability=0.0,
    mean=(0.0, 0.0, 0.0),
    standard_deviation=(1.0, 1.0, 1.0),
)


def photo(width: int, height: int, mode: str = "RGB") -> Image.Image:
    channels = (3,) if mode == "RGB" else ()
    rng = np.random.default_rng(width)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 8, *channels), dtype=np.uint8))
    return coarse.resize((width, height), Image.Resampling.BICUBIC)


def test_boxes_are_distributed_as_torchvisions() -> None:
    torch.manual_seed(0)
    number, width, height, scale = 4000, 50, 37, (0.3, 1.0)
    image = torch.zeros(3, height, width)
    transform = v2.RandomResizedCrop(8, scale=scale)
    params = [transform.make_params([image]) for _ in range(number)]
    drawn = np.array([[p["left"], p["top"], p["width"], p["height"]] for p in params])
    draws = hashed_uniforms(np.arange(number), seed=0, stream=Stream.CROPS, num_draws=22)
    boxes = random_resized_boxes(
        np.tile([width, height], (number, 1)), scales=np.tile(scale, (number, 1)), draws=draws
    )
    ours = np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)
    for column in range(4):
        grid = np.arange(51)
        difference = np.searchsorted(np.sort(ours[:, column]), grid, side="right")
        difference = difference - np.searchsorted(np.sort(drawn[:, column]), grid, side="right")
        assert np.abs(difference).max() / number < 0.045  # Kolmogorov-Smirnov, p = 6e-4


def test_boxes_lie_inside_and_thin_images_get_the_middle() -> None:
    sizes = np.array([[100, 3], [3, 100], [1, 1], [64, 48]])
    draws = hashed_uniforms(np.arange(4), seed=0, stream=Stream.CROPS, num_draws=22)
    boxes = random_resized_boxes(sizes, scales=np.tile([0.9, 1.0], (4, 1)), draws=draws)
    assert boxes[0].tolist() == [48, 0, 52, 3]
    assert boxes[1].tolist() == [0, 48, 3, 52]
    assert boxes[2].tolist() == [0, 0, 1, 1]
    assert (boxes[:, :2] >= 0).all()
    assert (boxes[:, 2:] <= sizes).all()


def test_crops_are_cut_and_resized_like_pillow() -> None:
    images = [photo(60, 40), photo(300, 200)]
    positions = np.array([10, 11])
    recipe = replace(PLAIN, global_crop_size_pixels=32, local_crop_size_pixels=16)
    made = make_crops(images, positions, recipe=recipe, seed=1)
    sizes = np.array([image.size for image in images])
    drawn = crop_boxes(sizes, positions, recipe=recipe, seed=1)
    for number, image in enumerate(images):
        for crop in range(5):
            size = 32 if crop < 2 else 16
            box = tuple(drawn.boxes[number, crop].tolist())
            expected = image.resize((size, size), Image.Resampling.BICUBIC, box=box)
            where = made.global_crops if crop < 2 else made.local_crops
            found = where[(crop if crop < 2 else crop - 2) * 2 + number]
            pixels = torch.from_numpy(np.array(expected)).permute(2, 0, 1).float() / 255
            torch.testing.assert_close(found, pixels)


def test_flips_mirror_the_crop() -> None:
    image, position = [photo(60, 40)], np.array([3])
    straight = make_crops(image, position, recipe=PLAIN, seed=0)
    mirrored = make_crops(
        image, position, recipe=replace(PLAIN, horizontal_flip_probability=1.0), seed=0
    )
    assert torch.equal(mirrored.global_crops, straight.global_crops.flip(-1))
    assert torch.equal(mirrored.local_crops, straight.local_crops.flip(-1))


def test_an_image_gets_the_same_crops_in_any_company() -> None:
    images = [photo(40 + i, 40) for i in range(4)]
    positions = np.arange(20, 24)
    recipe = replace(RECIPE, global_crop_size_pixels=32, local_crop_size_pixels=16)
    whole = make_crops(images, positions, recipe=recipe, seed=0)
    halves = [
        make_crops(images[i : i + 2], positions[i : i + 2], recipe=recipe, seed=0) for i in (0, 2)
    ]
    for name, number in (("global_crops", 2), ("local_crops", 3)):
        expected = getattr(whole, name).unflatten(0, (number, 4))
        parts = [getattr(half, name).unflatten(0, (number, 2)) for half in halves]
        torch.testing.assert_close(torch.cat(parts, dim=1), expected, atol=1e-6, rtol=0)


def test_gray_sources_give_three_equal_channels() -> None:
    made = make_crops([photo(40, 40, "L")], np.array([0]), recipe=PLAIN, seed=0)
    assert made.global_crops.shape == (2, 3, 224, 224)
    assert made.local_crops.shape == (3, 3, 98, 98)
    assert torch.equal(made.global_crops[:, 0], made.global_crops[:, 2])


def test_one_channel_and_no_local_crops() -> None:
    recipe = replace(RECIPE, num_local_crops=0, mean=(0.5,), standard_deviation=(0.25,))
    made = make_crops([photo(40, 40, "L")], np.array([0]), recipe=recipe, seed=0)
    assert made.global_crops.shape == (2, 1, 224, 224)
    assert made.local_crops.shape == (0, 1, 98, 98)


@pytest.mark.parametrize(
    ("recipe", "blur", "solarize", "expected"),
    [
        (replace(PLAIN, color_jitter_probability=0.8), 0.0, 0.0, 0.8),
        (replace(PLAIN, grayscale_probability=0.2), 0.0, 0.0, 0.2),
        (PLAIN, 0.9, 0.0, 0.9),
        (PLAIN, 0.0, 0.2, 0.2),
    ],
)
def test_operations_have_their_probability(
    recipe: Crops, blur: float, solarize: float, expected: float
) -> None:
    number, size = (400, 96) if blur else (3000, 6)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (1, 3, size, size), generator=generator)
    draws = hashed_uniforms(np.arange(number), seed=0, stream=Stream.COLORS, num_draws=13)
    made = augment_colors(
        pixels.to(torch.uint8).expand(number, -1, -1, -1),
        torch.from_numpy(draws).float(),
        recipe=recipe,
        blur_probability=blur,
        solarize_probability=solarize,
    )
    # One blur in 25 has a deviation so small that float32 shows nothing of it.
    share = (made != pixels / 255).flatten(1).any(dim=1).float().mean().item()
    assert abs(share - expected) < (0.08 if blur else 0.03)
