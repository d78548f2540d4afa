"""Bipartite soft matching (Bolya et al., "Token Merging: Your ViT But Faster", 2210.09461)."""

from typing import NamedTuple

import torch
from torch import Tensor

from tokenreduce.ops.selection import first_argmax, top_k_indices
from tokenreduce.ops.similarity import SMALLEST_NORM, unit_vectors

#: Entries of one tile of similarities: 2 Mi float32 values, 8 MiB.
TILE_ENTRIES = 1 << 21
#: Rows of a tile that are searched at a time.
ROWS = 128


class BipartiteMatch(NamedTuple):
    """The best partner of every source token.

    Attributes:
        source: ``(S,)`` positions of the source tokens.
        target: ``(T,)`` positions of the target tokens.
        partner: ``(B, S)`` for each source, the position of its most similar target.
        similarity: ``(B, S)`` cosine similarity of the two, float32.
    """

    source: Tensor
    target: Tensor
    partner: Tensor
    similarity: Tensor


class SoftMatching(NamedTuple):
    """One round of merging: which tokens stay, and where each token goes.

    Attributes:
        stays: ``(B, N - r)`` positions of the tokens that the outputs stand at: sources that stay
            single, most similar to their partner first, then all targets by position.
        groups: ``(B, N)`` the row of ``stays`` that each token flows into.
    """

    stays: Tensor
    groups: Tensor


def bipartite_match(keys: Tensor) -> BipartiteMatch:
    """Match each even token to its most similar odd token.

    Tiled over the sources: the memory beside the keys is bounded.

    Args:
        keys: ``(B, N, D)``, N >= 2.

    Returns:
        the matches; of equally similar targets the first wins.
    """
    # The length of a source changes no choice of a target, so sources stay as they are.
    sources, targets = keys[:, ::2].float(), unit_vectors(keys[:, 1::2]).mT
    length = torch.linalg.vector_norm(sources, dim=2, keepdim=True).clamp(min=SMALLEST_NORM)
    rows = max(1, TILE_ENTRIES // max(1, keys.shape[0] * targets.shape[2]))
    best, similarity = [], []
    for some, scale in zip(sources.split(rows, dim=1), length.split(rows, dim=1), strict=True):
        tile = some @ targets
        # A few rows at a time, which fit the cache.
        pieces = zip(tile.split(ROWS, dim=1), scale.split(ROWS, dim=1), strict=True)
        best.append(torch.cat([first_argmax(piece, scale=one) for piece, one in pieces], dim=1))
        similarity.append((tile.gather(2, best[-1][..., None]) / scale).squeeze(2))
    positions = torch.arange(keys.shape[1], device=keys.device)
    return BipartiteMatch(
        positions[::2],
        positions[1::2],
        positions[1::2][torch.cat(best, dim=1)],
        torch.cat(similarity, dim=1),
    )


def bipartite_soft_matching(
    keys: Tensor, merges: int, *, class_token: bool = False
) -> SoftMatching:
    """Merge the ``merges`` even tokens that are most similar to an odd token into that token.

    Args:
        keys: ``(B, N, D)``, N >= 2.
        merges: how many tokens disappear; at most half of those that may, (N - protected) // 2.
        class_token: whether token 0 is a class token. It never merges into another; its row comes
            first, and sources that stay single are listed by position.

    Returns:
        the round.
    """
    batch, n = keys.shape[:2]
    merges = max(0, min(merges, (n - class_token) // 2))
    match = bipartite_match(keys)
    score = match.similarity
    if class_token:
        score = score.index_fill(1, score.new_zeros(1, dtype=torch.long), -torch.inf)
    merged = torch.zeros_like(score, dtype=torch.bool)
    merged.scatter_(1, top_k_indices(score, merges, scale=1.0), True)
    order = score.masked_fill(merged, torch.inf).argsort(dim=1, descending=True, stable=True)
    single = match.source[order[:, merges:]]
    if class_token:
        single = single.sort(dim=1).values
    stays = torch.cat([single, match.target.expand(batch, -1)], dim=1)
    rows = torch.arange(stays.shape[1], device=keys.device).expand_as(stays)
    row_of = torch.zeros(batch, n, dtype=torch.long, device=keys.device).scatter(1, stays, rows)
    goes = torch.arange(n, device=keys.device).expand(batch, n).clone()
    goes[:, ::2] = torch.where(merged, match.partner, goes[:, ::2])
    return SoftMatching(stays, row_of.gather(1, goes))
