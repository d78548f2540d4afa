"""LLaVA-Scissor: connected components of similar tokens, in each frame and then over time.

Idea: tokens that are linked by chains of high similarity show one thing, wherever they lie. Take
the connected components of each frame, then those of the frames' components: what is left has no
two similar members and covers the whole clip.

Algorithm, for T frames of P tokens:
    1. space: link tokens of a frame whose cosine exceeds ``tau``; each connected component
       becomes its mean;
    2. time: link the components of all frames whose means have a cosine above ``tau``; each
       connected component c becomes the mean m_c of those means;
    3. every token joins the most cosine-similar m_c; the output is (m_c + sum of the n tokens that
       joined) / (n + 1).
With a budget of k, components are those of single linkage: step 1 takes the strongest links first
and stops before fewer than k components are left; step 2 takes the strongest links until k are
left, whatever their cosine. An output stands at the first token of its component that joined it, or
at its first token, and counts as synthetic, if none did. Ties go to the lowest index.

Shapes: features ``(B, T P, D)`` -> components -> ``(B, k, D)``. Cost: O(N P D) for step 1,
O(m^2 D) for step 2 with m components in frames, O(N k D) for step 3; step 2 grows with the square
of the clip's length unless ``tau`` holds m down. More than 16384 components are refused without a
budget, and linked further within their frames with one.

Deviations from the official code: components are exact (it samples nodes where a frame has many,
with an error bound epsilon, and exactly otherwise); outputs are in source order. Outputs equal
those of the official code on recorded cases.

Published: no comparable table.

```bibtex
@article{sun2025scissor,
  title={{LLaVA-Scissor}: Token Compression with Semantic Connected Components for Video {LLMs}},
  author={Sun, Boyuan and Zhao, Jiaxing and Wei, Xihan and Hou, Qibin},
  journal={arXiv preprint arXiv:2506.21862},
  year={2025}
}
```
"""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from tokenreduce.capabilities import CountClass
from tokenreduce.errors import PipelineError, TokensError
from tokenreduce.ops import MergeWeights, first_argmax, merge_tokens, top_k_indices, unit_vectors
from tokenreduce.ops.limits import MATRIX_LIMIT, require_matrix
from tokenreduce.ops.quotas import kept_indices
from tokenreduce.ops.spanning_trees import SpanningTree, components, maximum_spanning_tree
from tokenreduce.reducer import Reducer
from tokenreduce.reduction import Reduction
from tokenreduce.tokens import VisualTokens

#: Tokens that are compared with all components at a time.
TOGETHER = 1024


class ClipComponents(NamedTuple):
    """Components of one clip.

    Attributes:
        spatial: ``(N,)`` component in its frame of each token, counted over all frames.
        temporal: ``(m,)`` component over time of each of those.
        means: ``(k, D)`` mean of each component over time.
        joins: ``(N,)`` the component over time whose mean is most similar to each token.
    """

    spatial: Tensor
    temporal: Tensor
    means: Tensor
    joins: Tensor


@dataclass(frozen=True, kw_only=True)
class Scissor(Reducer):
    """Merges connected components of similar tokens.

    Args:
        tau: cosine above which two tokens are linked, in [-1, 1).

    Raises:
        PipelineError: if ``tau`` is out of range.
    """

    tau: float = 0.9

    adaptive: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not -1 <= self.tau < 1:
            raise PipelineError(f"scissor: tau={self.tau} is a cosine, in [-1, 1).")

    @property
    def count_class(self) -> CountClass:
        return "adaptive" if self.budget is None else "exact"

    def reduce(self, tokens: VisualTokens) -> Reduction:
        """Merge components.

        Raises:
            TokensError: if the tokens do not form a full grid, or have too many components.
        """
        frames = tokens.require_grid(self.name)[0]
        k = None if self.budget is None else self.count(tokens.count)
        clips = tokens.features.detach().unflatten(1, (frames, -1))
        found = [clip_components(clip.float(), self.tau, k) for clip in clips]
        joins = torch.stack([item.joins for item in found])
        members = torch.stack([item.temporal[item.spatial] for item in found])
        positions, synthetic = _positions(members, joins)
        count = positions.shape[1]
        # A component's number follows its first token; its place may be a later one.
        order = positions.argsort(1)
        rank = order.argsort(1)
        members, joins = rank.gather(1, members), rank.gather(1, joins)
        weights = _weights(members, joins, found)
        return Reduction(
            features=merge_tokens(tokens.features, weights, count),
            positions=positions.gather(1, order),
            assignment=joins,
            weights=weights,
            synthetic=synthetic.gather(1, order),
        )


def clip_components(clip: Tensor, tau: float, k: int | None = None) -> ClipComponents:
    """Steps 1 to 3.

    Args:
        clip: ``(T, P, D)`` float32.
        tau: cosine above which two tokens are linked.
        k: how many components to leave; what ``tau`` leaves if omitted.

    Returns:
        components numbered by their first token.
    """
    frames, places, _ = clip.shape
    n = frames * places
    require_matrix(places, "components of frames")
    tree = maximum_spanning_tree(unit_vectors(clip))
    linked = tree.similarity > tau
    if k is not None:
        linked = _strongest(tree, int(linked.sum()), n, k)
    label = components(tree.parent, linked)
    label += places * torch.arange(frames, device=clip.device)[:, None]
    spatial, first = _number(label.flatten())
    means = _group_means(clip.flatten(0, 1), spatial, len(first))
    if len(first) > MATRIX_LIMIT:
        raise TokensError(
            f"scissor: {len(first)} components in frames at tau={tau} are more than the "
            f"{MATRIX_LIMIT} whose similarities fit; give a budget, lower tau, or wrap it in "
            "per_segment."
        )
    tree = maximum_spanning_tree(unit_vectors(means)[None])
    linked = tree.similarity > tau
    if k is not None:
        links = top_k_indices(tree.similarity, len(first) - k, scale=1.0)
        linked = torch.zeros_like(linked).scatter_(1, links, True)
    temporal, heads = _number(components(tree.parent, linked)[0])
    means = _group_means(means, temporal, len(heads))
    joins = _most_similar(clip.flatten(0, 1), unit_vectors(means))
    return ClipComponents(spatial, temporal, means, joins)


def _strongest(tree: SpanningTree, above: int, n: int, k: int) -> Tensor:
    """The links to take within frames when k components are wanted in the end."""
    links = max(above, n - max(k, MATRIX_LIMIT))
    # The first token of a frame has no link.
    links = min(links, n - k, n - len(tree.parent))
    taken = top_k_indices(tree.similarity.flatten(), links, scale=1.0)
    linked = torch.zeros(n, dtype=torch.bool, device=taken.device)
    return linked.index_fill_(0, taken, True).reshape(tree.parent.shape)


def _most_similar(tokens: Tensor, units: Tensor) -> Tensor:
    """The most similar one of the unit vectors to each token, some tokens at a time."""
    return torch.cat(
        [first_argmax(unit_vectors(part) @ units.T, scale=1.0) for part in tokens.split(TOGETHER)]
    )


def _number(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Labels, which are first members, counted from 0; and those first members."""
    first, number = labels.unique(return_inverse=True)
    return number, first


def _group_means(features: Tensor, groups: Tensor, count: int) -> Tensor:
    total = features.new_zeros(count, features.shape[1]).index_add_(0, groups, features)
    return total / torch.bincount(groups, minlength=count)[:, None]


def _positions(members: Tensor, joins: Tensor) -> tuple[Tensor, Tensor]:
    """Where each component stands, and whether no token of it joined it, both ``(B, k)``."""
    n = members.shape[1]
    counts = members.amax(1) + 1
    k = int(counts.max())
    if bool((counts != k).any()):
        # Raises, with the numbers.
        kept_indices(torch.arange(k, device=members.device) < counts[:, None])
    index = torch.arange(n, device=members.device).expand_as(members)
    nowhere = members.new_full((members.shape[0], k), n)
    first = nowhere.scatter_reduce(1, members, index, "amin")
    loyal = nowhere.scatter_reduce(1, members, index.masked_fill(members != joins, n), "amin")
    return torch.where(loyal < n, loyal, first), loyal == n


def _weights(members: Tensor, joins: Tensor, found: list[ClipComponents]) -> MergeWeights:
    """Two edges of each token: as a member of a component, and as one that joined."""
    share = torch.stack(
        [
            1
            / torch.bincount(item.spatial)[item.spatial]
            / torch.bincount(item.temporal)[item.temporal[item.spatial]]
            for item in found
        ]
    )
    joined = torch.zeros_like(share).scatter_add(1, joins, torch.ones_like(share))
    source = torch.arange(members.shape[1], device=members.device).expand_as(members)
    whole = 1 / (1 + joined)
    return MergeWeights(
        torch.cat([members, joins], dim=1),
        torch.cat([source, source], dim=1),
        torch.cat([share * whole.gather(1, members), whole.gather(1, joins)], dim=1),
    )
