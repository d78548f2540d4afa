"""Drop masks: the lowest scores of each query."""

import pytest
import torch

from tokenreduce.ops.drop_mask import lowest_share_mask


@pytest.mark.parametrize("share", [0.0, 0.1, 0.25, 1.0])
def test_oracle(share):
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(0, 6, (2, 4, 21), generator=generator).float()
    mask = lowest_share_mask(scores, share)
    for row, left_out in zip(scores.reshape(-1, 21).tolist(), mask.reshape(-1, 21), strict=True):
        stays = sorted(range(21), key=lambda i: (-row[i], i))[: 21 - int(share * 21)]
        assert left_out.tolist() == [i not in stays for i in range(21)]
