"""LFTR: learning-free token reduction.

Idea: in a clip, neighbouring frames mostly repeat each other; within a frame, many patches show the
same thing and few say much. So merge along time what says the same, group what is left around
spread representatives, and let the least significant groups go. Features are all it reads: no
attention, no text, no geometry beyond which frames are neighbours. It runs behind Q-Formers, pixel
shuffles and packed grids alike.

This is a reconstruction from the paper's abstracts, the only public description. The authors'
equations, settings and code are not public; they claim up to 16x fewer visual tokens.

Notation: tokens x_i with sizes s_i (source tokens each stands for), unit vectors u_i = x_i / |x_i|
(all zero vectors share one direction), mean m = sum_i s_i u_i / sum_i s_i. The *difference* of two
tokens is d_ij = (1 - u_i . u_j) / (1 - |m|^2): 1 for a pair drawn at random, whatever the spread
of the encoder's features.

Algorithm, for N tokens and a budget of k:
    1. time (clips only): link each token to the one at the same place in the frame before, if their
       difference is at most ``still``. Every such link earns time one token of the cut; at most
       N - k are taken, those of least difference. Runs of links become one token, their
       size-weighted mean, at the place of the earliest. n tokens remain.
    2. grouping: a token is redundant beside another if their difference is at most ``redundant``.
       Pick representatives: first the token most similar to m; then, while any token is not
       redundant beside its nearest representative, the one that differs most from it, up to
       min(n, ceil(``spare`` k)). If all are redundant before there are k, pick on up to k the token
       of largest difference times the size of its group, so that what is left of the budget goes
       to contents in proportion to their extent. Redundant tokens form the group of their nearest
       representative; others stay alone.
    3. space: the significance of a group r of size S_r is S_r d_r h_r, where d_r is the difference
       of its representative from the whole, (1 - u_r . m) / (1 - |m|^2), and h_r that from its most
       similar group of no smaller size (of equal sizes, the earlier counts as larger; the largest
       group has its largest difference from any). Groups of least significance go until k are
       left; their tokens join the nearest of these if redundant beside it, else they go too. Each
       group becomes the size-weighted mean of its tokens, at its representative's place.
    In items that stand for more than W = 4096 tokens, what step 1 leaves is linked instead of all
    compared with each other; the first token of a run of links in time stands for it:
    2'. each token is linked to its most similar earlier token. Its *novelty* is their difference;
        it is redundant if that is at most ``redundant``.
    3'. the k tokens of largest novelty stay, each at its own place; where more than k tokens are
        not redundant, the k of those whose size (of the tokens that redundant links lead to it from
        and that are redundant beside it) times novelty times difference from the whole is largest.
        The others follow their links to one that stays, and join its group if they are redundant
        beside it, else they go.
    In a stream, a token's novelty is the least that was found while it was held: what it was
    compared with on its arrival may be gone. The last frame of a window is held with what its
    tokens belong to, so that runs of links go on in the next; m is that of all that was fed.

Shapes: features ``(B, N, D)`` -> groups ``(B, N)`` and positions ``(B, k)`` -> ``(B, k, D)``. The
count is exact for every layout. Protected tokens stand outside.

Cost: up to W tokens one Gram matrix, O(n^2 D) time and O(n^2) memory, then
R <= ``spare`` k steps of O(n); space O(R n D + R^2). Beyond, one search for earlier neighbours:
exact, O(n^2 D) time; with FAISS, O(n sqrt(n)) on 256 projected channels. Memory beside the features
is the result, O(N) numbers, and for FAISS an index of n x 256 bytes: nothing is N x N, and the
features are not copied.

From the abstracts: reduction along time by merging adjacent tokens, along space by dropping less
significant ones; no training; a budget of up to 16x. Free choices, all ours:
    - metric: cosine, scaled by the item's own spread, in float32;
    - matching in time: same place, neighbouring frames, chained; what moves is matched freely, by
      the representatives of step 2, which see all frames of a run;
    - split of the budget: time takes what its redundant links earn, space the rest;
    - representatives: spread ones (farthest first), more than are kept where there is that much to
      represent, so that step 3 chooses; by extent where there is not;
    - long items: links to earlier tokens, which no window disturbs, in place of farthest-first
      representatives, which need all pairs;
    - weighting: by size, so that a mean of means is the mean of the source tokens;
    - significance: the plain product, without exponents to tune;
    - ``redundant`` and ``spare`` were chosen on two small models, of pictures and of clips, with
      tuning seeds (see the testbed's results); ``still`` follows the cost of long clips, where less
      leaves more to link: on the model of clips, 0.1 and 0.15 answer a quarter of a point better;
    - step 3 drops only where more contents than k stand apart: in all of the testbed's tuning
      scenes at 16x, in 86 % at 8x and in none at 4x, where every token ends in a mean;
    - tokens of a dropped group that repeat no kept one are lost, not averaged into it;
    - ties go to the lowest index.

Official code: none to compare with.

```bibtex
@article{zhao2025lftr,
  title={{LFTR}: Learning-Free Token Reduction for Multimodal Large Language Models},
  author={Zhao, Zihui and Li, Yingxin and Li, Yang},
  journal={arXiv preprint arXiv:2501.17391},
  year={2025}
}
```
"""

from dataclasses import dataclass
from math import ceil
from typing import Final

import torch
from torch import Tensor

from tokenreduce.errors import PipelineError
from tokenreduce.neighbors import check_backend, nearest_earlier
from tokenreduce.ops import (
    covering,
    first_argmax,
    gather_tokens,
    gram_matrix,
    group_weights,
    merge_tokens,
    top_k_indices,
    tracks,
)
from tokenreduce.ops.links import follow_links
from tokenreduce.ops.similarity import directions
from tokenreduce.reducer import Grouping, Merger
from tokenreduce.reduction import DROPPED
from tokenreduce.tokens import VisualTokens

RUN_TOKENS: Final = 4096
"""W: tokens of the largest Gram matrix, 64 MiB."""


@dataclass(frozen=True, kw_only=True)
class LFTR(Merger):
    """Merges along time, groups around representatives, drops the least significant groups.

    Args:
        still: largest difference at which a token repeats the one before it in time, in [0, 1], as
            a share of the mean difference of two tokens of the item. Lower it where small changes
            matter (surveillance, gestures); 0 merges exact repetitions only. Idle on images.
        redundant: the same for a token beside its representative: at 1 whatever is nearer than two
            tokens drawn at random, at 0.2 five times nearer. Lower it where near-duplicates matter
            (documents); 0 merges exact repetitions only.
        spare: representatives for each kept token, at least 1. With 1 the spread alone decides
            what stays; more let significance decide among them.
        neighbors: backend of the search in items of more than W tokens. ``"auto"`` is exact up to
            the measured crossover and FAISS, where it is installed, beyond; ``"torch"`` is exact.

    Raises:
        PipelineError: if an option is out of range.
        UnknownName: if no plugin registered the neighbour backend.
    """

    still: float = 0.25
    redundant: float = 0.2
    spare: float = 1.5
    neighbors: str = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("still", "redundant"):
            if not 0 <= (value := getattr(self, name)) <= 1:
                raise PipelineError(f"{self.name}: {name}={value} must lie in [0, 1].")
        if not 1 <= self.spare < float("inf"):
            raise PipelineError(f"{self.name}: spare={self.spare} must be finite and at least 1.")
        check_backend(self.neighbors)

    def assign(self, tokens: VisualTokens, k: int) -> Grouping:
        order, linked = (t.to(tokens.features.device) for t in tracks.tracks(tokens.layout))
        long = _long(tokens.sizes)
        one_by_one = bool(linked.any()) or long or "former_groups" in tokens.signals
        # What remains after the temporal step differs between clips.
        step = 1 if one_by_one else max(1, RUN_TOKENS**2 // tokens.count**2)
        parts = []
        for start in range(0, tokens.batch, step):
            if one_by_one:
                parts.append(self._item(tokens.item(start), order, linked, k))
            else:
                unit = directions(tokens.features[start : start + step].detach())
                sizes = tokens.sizes[start : start + step].float()
                groups, positions = self._run(unit, sizes, k)
                parts.append((groups, positions, sizes))
        groups, positions, scores = (torch.cat(column) for column in zip(*parts, strict=True))
        return Grouping(groups, positions=positions, scores=scores if long else None)

    def _item(
        self, tokens: VisualTokens, order: Tensor, linked: Tensor, k: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """All three steps for one item; see :mod:`~tokenreduce.ops.tracks`."""
        features, sizes, signals = tokens.features[0].detach(), tokens.sizes.float(), tokens.signals
        mean = signals.get("seen_direction")
        mean = tracks.mean_direction(features, sizes) if mean is None else mean
        spread = covering.spread_around(mean)
        cosine = tracks.track_cosine(features, order, linked)
        repeats = cosine >= _least(spread, self.still)
        everyone = torch.arange(tokens.count, device=features.device)
        first = tracks.first_of_equals(signals.get("former_groups", everyone[None])[0])
        spent = tokens.count - k - int((first != everyone).sum())
        if int(repeats.sum()) > spent:
            most = top_k_indices(cosine[None], spent, scale=1.0)
            repeats = torch.zeros_like(repeats).index_fill(0, most[0], True)
        heads, tube = tracks.rejoin(*tracks.tubes(order, repeats), first)
        count = heads.numel()
        weight = torch.zeros(1, count, device=sizes.device).scatter_add(1, tube[None], sizes)
        scores = signals.get("former_scores", sizes * torch.nan)[0, heads]
        if _long(sizes):
            groups, positions = self._link(features, heads, weight[0], mean, scores, k)
        else:
            merge = group_weights(tube[None], sizes, count)
            unit = directions(merge_tokens(features[None], merge, count, dtype=torch.float32))
            groups, positions = self._run(unit, weight, k)
        return groups[:, tube], heads[positions], scores[tube][None]

    def _link(
        self,
        features: Tensor,
        heads: Tensor,
        sizes: Tensor,
        mean: Tensor,
        scores: Tensor,
        k: int,
    ) -> tuple[Tensor, Tensor]:
        """Steps 2' and 3' for the tokens at ``heads`` ``(n,)``, with ``sizes`` ``(n,)``.

        Their distances to the nearest earlier token are noted in ``scores`` ``(n,)``; who stood
        apart before still does, and does not search.
        """
        spread = covering.spread_around(mean)
        least = _least(spread, self.redundant)
        known = 1 - covering.DISTANCE_NOISE - scores
        asked = ~(known < least)
        cosine, link = nearest_earlier(
            features, heads, asked=asked.nonzero()[:, 0], backend=self.neighbors
        )
        cosine[0], link[0] = -1, 0
        cosine = torch.where(asked, cosine.fmax(known), known)
        scores.copy_(covering.cosine_distance(cosine))
        own = torch.arange(len(heads), device=heads.device)
        novelty = scores / spread
        redundant = cosine >= least
        score, scale = novelty, 1 / spread
        if int((~redundant).sum()) > k:
            group = follow_links(torch.where(redundant, link, own))
            beside = tracks.between(features, heads, heads[group]) >= least
            size = torch.zeros_like(novelty).scatter_add(0, group, sizes * (beside | ~redundant))
            unlike = covering.cosine_distance(tracks.cosine_to(features, heads, mean[0])) / spread
            score = size * novelty * unlike
            score, scale = score.masked_fill(redundant, -torch.inf), size.amax() / spread
        kept = top_k_indices(score[None], k, scale=scale)[0]
        rank = torch.full_like(own, DROPPED).index_copy(0, kept, own[:k])
        end = follow_links(torch.where((rank < 0) & redundant, link, own))
        groups = rank[end]
        lost = tracks.between(features, heads, heads[end]) < least
        return groups.masked_fill(lost & (end != own), DROPPED)[None], kept[None]

    def _run(self, unit: Tensor, sizes: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Steps 2 and 3 for unit vectors ``(b, n, D)`` of one run."""
        batch, n, _ = unit.shape
        mean, spread = covering.mean_and_spread(unit, sizes)
        whole = (unit @ mean[..., None]).squeeze(2)
        gram = None
        if n <= RUN_TOKENS:
            gram = gram_matrix(unit).clamp_(max=1 - covering.DISTANCE_NOISE)
        count = min(n, ceil(self.spare * k))
        picks = covering.covering_representatives(
            unit,
            sizes,
            self.redundant * spread,
            first=first_argmax(whole, scale=1.0),
            least=k,
            most=count,
            gram=gram,
        )
        cosine = unit @ gather_tokens(unit, picks).transpose(1, 2)
        least = _least(spread, self.redundant)
        group = covering.join_nearest(cosine, picks, least)
        # Tokens without a group are counted in a spare first column.
        size = sizes.new_zeros(batch, count + 1).scatter_add(1, group + 1, sizes)[:, 1:]

        between = covering.cosine_distance(gather_tokens(cosine, picks)) / spread[:, None, None]
        apart = covering.distance_to_larger(between, size)
        unlike = covering.cosine_distance(whole.gather(1, picks)) / spread[:, None]
        significance = (size * unlike * apart).masked_fill(size == 0, -torch.inf)
        scale = size.amax(1, keepdim=True) / spread[:, None]
        kept = top_k_indices(significance, k, scale=scale)

        picks = picks.gather(1, kept)
        cosine = cosine.gather(2, kept[:, None].expand(-1, n, -1))
        return covering.join_nearest(cosine, picks, least), picks


def _long(sizes: Tensor) -> bool:
    """Whether items, of tokens of sizes ``(B, N)``, stand for more than W tokens."""
    return sizes.shape[1] > RUN_TOKENS or bool((sizes.sum(1) > RUN_TOKENS).any())


def _least(spread: Tensor, difference: float) -> Tensor:
    """The lowest cosine of two tokens that differ by at most ``difference``."""
    return 1 - covering.DISTANCE_NOISE - difference * spread
