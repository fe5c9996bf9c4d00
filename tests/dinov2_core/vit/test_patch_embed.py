import pytest
import torch

from dinov2_core.vit.patch_embed import PatchEmbed, PatchGrid


def test_patches_are_projected_row_by_row() -> None:
    embed = PatchEmbed(patch_size_pixels=2, num_channels=3, embed_dim=5)
    images = torch.randn(2, 3, 4, 6, generator=torch.Generator().manual_seed(0))
    tokens = embed(images)
    assert tokens.shape == (2, 6, 5)
    patch = images[1, :, 2:4, 4:6]  # last of the second row
    expected = (embed.proj.weight * patch).sum((1, 2, 3)) + embed.proj.bias
    torch.testing.assert_close(tokens[1, 5], expected)
    assert embed.grid(images) == PatchGrid(height=2, width=3)


def test_initialisation_is_that_of_a_plain_convolution() -> None:
    embed = PatchEmbed(patch_size_pixels=4, num_channels=3, embed_dim=5)
    embed.init_weights(torch.Generator().manual_seed(0))
    bound = 48**-0.5
    for values in (embed.proj.weight, embed.proj.bias):
        assert values is not None
        assert values.abs().max() <= bound
        assert values.abs().max() > 0.5 * bound


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 3, 4, 5), "4 x 5 pixels is not a whole number of patches of 2"),
        ((1, 4, 4, 4), "images have 4 channels"),
    ],
)
def test_images_that_do_not_fit_are_refused(shape: tuple[int, ...], message: str) -> None:
    embed = PatchEmbed(patch_size_pixels=2, num_channels=3, embed_dim=5)
    with pytest.raises(ValueError, match=message):
        embed.grid(torch.zeros(shape))
