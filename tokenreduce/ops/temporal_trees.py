"""Trees of the tokens of a clip, each of which may lean on one of the frame before."""

import torch
from torch import Tensor

from tokenreduce.ops.merging import MergeWeights, merge_tokens
from tokenreduce.ops.selection import first_argmax
from tokenreduce.ops.similarity import SMALLEST_NORM

#: Entries of the similarities of neighbouring frames held at a time: 512 Ki float32 values, 2 MiB,
#: which fit the cache.
TILE_ENTRIES = 1 << 19


def nearest_in_frame_before(frames: Tensor, takes: Tensor) -> tuple[Tensor, Tensor]:
    """The most similar token of the frame before.

    Args:
        frames: ``(T, P, D)`` float32.
        takes: ``(T, P)`` booleans, tokens that may be leant on.

    Returns:
        for frames 1 to T - 1 its place and its cosine, both ``(T - 1, P)``; ties go to the lowest
        place, and the cosine is -1 where none may be leant on.
    """
    # Products of frames are scaled, since there is less of them than of frames.
    norm = torch.linalg.vector_norm(frames, dim=2).clamp(min=SMALLEST_NORM)
    together = max(1, TILE_ENTRIES // frames.shape[1] ** 2)
    places, cosines = [takes[:0].long()], [norm[:0]]
    whole = (frames[1:], frames[:-1], norm[1:], norm[:-1], takes[:-1])
    for part, before, length, length_before, open_before in zip(
        *(each.split(together) for each in whole), strict=True
    ):
        cosine = torch.bmm(part, before.mT).div_(length_before[:, None]).div_(length[..., None])
        cosine.masked_fill_(~open_before[:, None], -1)
        places.append(first_argmax(cosine, scale=1.0))
        cosines.append(cosine.gather(2, places[-1][..., None]).squeeze(2))
    return torch.cat(places), torch.cat(cosines)


def tree_roots(place: Tensor, linked: Tensor) -> Tensor:
    """``(T * P,)`` the first token of each token's tree.

    Args:
        place: ``(T - 1, P)`` the place a frame before that a token of frames 1 to T - 1 leans on.
        linked: ``(T - 1, P)`` booleans, whether it does.
    """
    count, places = place.shape[0] + 1, place.shape[1]
    own = torch.arange(count * places, device=place.device).reshape(count, places)
    roots = [own[0]]
    for towards, holds, itself in zip(place, linked, own[1:], strict=True):
        roots.append(torch.where(holds, roots[-1][towards], itself))
    return torch.stack(roots).flatten()


def tree_means(frames: Tensor, roots: Tensor, members: Tensor, wanted: Tensor) -> Tensor:
    """The means of the trees that begin in some frames.

    Args:
        frames: ``(T, P, D)`` float32.
        roots: ``(T * P,)`` the first token of each token's tree.
        members: ``(T * P,)`` how many tokens the tree of each first token has.
        wanted: ``(T,)`` booleans, C of them true.

    Returns:
        ``(C, P, D)``, at the places of the first tokens; 0 at others.
    """
    places = frames.shape[1]
    source = wanted[roots // places].nonzero().squeeze(1)
    rank = wanted.cumsum(0) - 1
    tree = rank[roots[source] // places] * places + roots[source] % places
    edges = MergeWeights(tree[None], source[None], 1 / members[roots[source]][None])
    means = merge_tokens(frames.flatten(0, 1)[None], edges, int(wanted.sum()) * places)
    trees: Tensor = means.unflatten(1, (-1, places))[0]
    return trees
