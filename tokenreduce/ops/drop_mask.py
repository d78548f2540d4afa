"""Which visual tokens each text token leaves out (ADEM-VL, 2410.17779)."""

from fractions import Fraction

import torch
from torch import Tensor

from tokenreduce.ops.quotas import top_mask


def lowest_share_mask(scores: Tensor, share: float | Fraction) -> Tensor:
    """The lowest scores of each row: what a query leaves out of its attention.

    This reduces no tokens: other queries may need what one leaves out. It is for attention that
    takes a mask for each query, whose entries it sets to zero. What all of them leave out can go:
    that is the strategy ``text-drop-mask``.

    Args:
        scores: ``(..., N)`` floating point, of each query for each visual token.
        share: of the tokens that each query leaves out, in [0, 1]; the count rounds down.

    Returns:
        ``(..., N)`` booleans, true where the token is left out. Of equal scores, the first stays.
    """
    stays = scores.shape[-1] - int(share * scores.shape[-1])
    counts = torch.full(scores.shape[:-1], stays, device=scores.device)
    return ~top_mask(scores, counts)
