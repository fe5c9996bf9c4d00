import torch

from dinov2_core.vit.packing import CropGroup, split_rows


def test_rows_of_a_group_lie_together() -> None:
    groups = (CropGroup(num_crops=2, num_tokens=3), CropGroup(num_crops=1, num_tokens=4))

    first, second = split_rows(torch.arange(10), groups=groups)

    assert first.tolist() == [0, 1, 2, 3, 4, 5]
    assert second.tolist() == [6, 7, 8, 9]
    assert [group.num_rows for group in groups] == [6, 4]
