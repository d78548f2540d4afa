"""What strategies share that keep some tokens and one more that stands for all the rest."""

import torch
from torch import Tensor

from tokenreduce.errors import TokensError
from tokenreduce.ops import MergeWeights, gather_tokens, merge_tokens
from tokenreduce.reducer import Reducer
from tokenreduce.reduction import Reduction
from tokenreduce.tokens import VisualTokens


def outlier_share(scores: Tensor) -> Tensor:
    """Share of each row's scores above Q3 + 1.5 (Q3 - Q1), with interpolated quartiles.

    Args:
        scores: ``(B, N)`` floating point.

    Returns:
        ``(B,)`` float64.
    """
    values = scores.double().sort(dim=1).values
    place = torch.tensor([0.25, 0.75], dtype=torch.float64, device=scores.device)
    place = place * (scores.shape[1] - 1)
    low, high = values[:, place.floor().long()], values[:, place.ceil().long()]
    first, third = (low + (high - low) * place.frac()).unbind(1)
    return (values > (third + 1.5 * (third - first))[:, None]).double().mean(1)


def official_count(reducer: Reducer, n: int) -> int:
    """How many of ``n`` tokens official code keeps on a budget: shares round down."""
    ratio = reducer.keep_ratio
    return reducer.count(n) if ratio is None else max(1, int(n * ratio))


def common_count(counts: Tensor, *, strategy: str) -> int:
    """The count that all items of a batch come to.

    Args:
        counts: ``(B,)`` integers.
        strategy: its name, for the message.

    Raises:
        TokensError: if the items come to different counts.
    """
    if int(counts.min()) != int(counts.max()):
        raise TokensError(
            f"{strategy} decides by itself how many tokens to keep, and these items differ: "
            f"{counts.tolist()}. Reduce them one by one, or give a budget."
        )
    return int(counts[0])


def remainder_edges(kept: Tensor, weights: Tensor) -> MergeWeights:
    """Each kept token as it is, then one output of all others.

    Args:
        kept: ``(B, m)`` tokens to keep; token kept[j] becomes output j.
        weights: ``(B, N)`` weight of each token in output m, if it is not kept.

    Returns:
        m edges of the kept tokens, then N edges into output m.
    """
    batch, n = weights.shape
    output = torch.arange(kept.shape[1], device=kept.device).expand_as(kept)
    everyone = torch.arange(n, device=kept.device).expand(batch, n)
    rest = weights.float().scatter(1, kept, 0)
    return MergeWeights(
        torch.cat([output, torch.full_like(everyone, kept.shape[1])], dim=1),
        torch.cat([kept, everyone], dim=1),
        torch.cat([torch.ones_like(kept, dtype=torch.float32), rest], dim=1),
    )


def keep_with_remainder(tokens: VisualTokens, kept: Tensor, edges: MergeWeights) -> Reduction:
    """Outputs at the kept tokens, and one at the last of the others, which stands for them all.

    Args:
        tokens: the source tokens.
        kept: ``(B, m)`` distinct indices, m < N.
        edges: those of :func:`remainder_edges`, then any others into outputs 0 to m - 1.
    """
    m, n = kept.shape[1], tokens.count
    everyone = torch.arange(n, device=kept.device).expand(tokens.batch, -1)
    last = everyone.scatter(1, kept, -1).amax(1, keepdim=True)
    stands = torch.cat([kept, last], dim=1)
    order = stands.argsort(dim=1)
    rank = order.argsort(dim=1)
    # The output of nearly all tokens is a matrix product, many times faster than a scatter.
    wide = tokens.features if tokens.features.dtype == torch.float64 else tokens.features.float()
    rest = edges.value[:, None, m : m + n].to(wide.dtype) @ wide
    own = MergeWeights(*(torch.cat([part[:, :m], part[:, m + n :]], dim=1) for part in edges))
    if own.output.shape[1] > m:
        # So are outputs of many tokens each.
        dense = wide.new_zeros(tokens.batch, m * n)
        dense.scatter_add_(1, own.output * n + own.source, own.value.to(wide.dtype))
        made = (dense.unflatten(1, (m, n)) @ wide).to(tokens.features.dtype)
    else:
        made = merge_tokens(tokens.features, own, m)
    features = torch.cat([made, rest.to(tokens.features.dtype)], dim=1)
    return Reduction(
        features=gather_tokens(features, order),
        positions=stands.gather(1, order),
        assignment=rank[:, m:].expand(-1, n).scatter(1, kept, rank[:, :m]),
        weights=edges._replace(output=rank.gather(1, edges.output)),
        synthetic=order == m,
    )
