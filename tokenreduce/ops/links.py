"""Tokens linked to earlier ones."""

import torch
from torch import Tensor


def follow_links(link: Tensor) -> Tensor:
    """Where each token's chain of links ends.

    Args:
        link: ``(n,)`` index of the token that each links to, never a later one; its own where its
            chain ends.

    Returns:
        ``(n,)`` index of the end of each chain. O(n log n) time.
    """
    while not torch.equal(further := link[link], link):
        link = further
    return link
