"""Keeps attended tokens, tile by tile, on budgets that the thumbnail sets.

Idea: a high-resolution image is encoded as a thumbnail and tiles. In an early layer the class token
of the thumbnail looks at where things are, so its attention says how much of the budget each tile
deserves; in a late layer the class token of each tile says which of its tokens to keep.

Algorithm, with a budget of k over thumbnail (the first block) and tiles:
    1. the thumbnail keeps its min(floor(``alpha`` k), all) most attended tokens;
    2. h_t = how many of the thumbnail's floor((1 - ``alpha``) n) tokens of largest *shallow*
       attention lie where tile t lies, n its tokens;
    3. the rest of the budget is shared among the tiles in proportion to h_t, by largest remainder,
       no tile above its own number of tokens;
    4. each tile keeps its most attended tokens.
A plain image is one block and keeps its k most attended tokens. A mosaic of tiles (one block behind
the thumbnail) is cut into parts of the thumbnail's size.

Shapes: class attention ``(B, N)`` -> kept ``(B, k, D)``. Cost: O(N); the features are not read.

Deviations from the official code: attention is averaged, not summed, over heads; shallow attention
is a signal of the user's choice, the same as the late one by default (the official code takes that
of layer 0: ``shallow="shallow_class_attention"``, where the model gives it); tiles are where they
are in the image, and the budget is met exactly. The official code takes the t-th run of the
flattened thumbnail for tile t and loses what rounding leaves over (``official=True``). Tokens equal
those of the official code on recorded cases.

Published: LLaVA-1.5-7B, in percent of the full model with 128 / 64 tokens: 91.7 / 87.9 (table of
the ProViP paper).

```bibtex
@inproceedings{arif2025hired,
  title={{HiRED}: Attention-Guided Token Dropping for Efficient Inference of High-Resolution
         Vision-Language Models},
  author={Arif, Kazi Hasan Ibn and Yoon, JinYi and Nikolopoulos, Dimitrios S. and
          Vandierendonck, Hans and John, Deepu and Ji, Bo},
  booktitle={Proceedings of the AAAI Conference on Artificial Intelligence},
  year={2025},
  eprint={2408.10945},
  archivePrefix={arXiv}
}
```
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tokenreduce.capabilities import CountClass
from tokenreduce.errors import PipelineError, TokensError
from tokenreduce.ops import top_k_indices
from tokenreduce.reducer import Reducer
from tokenreduce.reduction import Reduction
from tokenreduce.tokens import Layout, VisualTokens
from tokenreduce_strategies.remainders import common_count, official_count


@dataclass(frozen=True, kw_only=True)
class HiRED(Reducer):
    """Keeps the most attended tokens of thumbnail and tiles.

    Args:
        alpha: share of the budget that goes to the thumbnail, in [0, 1].
        shallow: the signal that shares the rest among tiles, one value for each token.
        grid: rows and columns of the tiles, where they are blocks of their own; the squarest
            arrangement, at least as wide as high, if None.
        official: lay out tiles and round as the official code does.

    Raises:
        PipelineError: if an option is out of range.
    """

    alpha: float = 0.5
    shallow: str = "class_attention"
    grid: tuple[int, int] | None = None
    official: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.alpha <= 1:
            raise PipelineError(f"{self.name}: alpha={self.alpha} must lie in [0, 1].")
        if self.grid is not None and (len(self.grid) != 2 or min(self.grid) < 1):
            raise PipelineError(f"{self.name}: grid={self.grid} must be (rows, columns).")

    @property
    def count_class(self) -> CountClass:
        return "adaptive" if self.official else "exact"

    @property
    def needs(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys([*super().needs, self.shallow]))

    def reduce(self, tokens: VisualTokens) -> Reduction:
        deep = tokens.signal("class_attention").detach().float().log()
        shallow = tokens.signal(self.shallow).detach().float().log()
        k = official_count(self, tokens.count) if self.official else self.count(tokens.count)
        thumbnail, tiles, seen = _parts(tokens.layout, self.grid, contiguous=self.official)
        shares = [self.shares(row, k, thumbnail, tiles, seen) for row in shallow]
        common_count(torch.tensor([sum(share) for share in shares]), strategy=self.name)
        kept = []
        for row, share in zip(deep, shares, strict=True):
            parts = [part.to(row.device) for part in (thumbnail, *tiles)]
            chosen = [
                part[top_k_indices(row[part], own)] for part, own in zip(parts, share, strict=True)
            ]
            kept.append(torch.cat(chosen))
        return Reduction.from_kept(tokens, torch.stack(kept))

    def shares(
        self,
        shallow: Tensor,
        k: int,
        thumbnail: Tensor,
        tiles: Sequence[Tensor],
        seen: Tensor,
    ) -> list[int]:
        """Tokens to keep of the thumbnail and of each tile.

        Args:
            shallow: ``(N,)`` shallow attention, or a rising function of it.
            k: the budget.
            thumbnail: ``(n,)`` tokens of the thumbnail.
            tiles: tokens of each tile.
            seen: ``(n,)`` the tile that lies where each token of the thumbnail lies.
        """
        n, room = len(thumbnail), [len(tile) for tile in tiles]
        if not tiles:
            return [k]
        own = min(int(k * self.alpha), n)
        look = top_k_indices(shallow[thumbnail.to(shallow.device)], int((1 - self.alpha) * n)).cpu()
        hits = torch.bincount(seen[look], minlength=len(tiles)).tolist()
        if self.official:
            # In its float32 arithmetic, where a whole number may come out as just less.
            part = torch.tensor(hits, dtype=torch.float32) / max(1, sum(hits)) * (k - own)
            return [own, *(min(int(p), r) for p, r in zip(part.tolist(), room, strict=True))]
        own = max(own, k - sum(room))
        return [own, *_apportion(k - own, hits, room)]


def _apportion(total: int, weights: list[int], room: list[int]) -> list[int]:
    """Share ``total`` in proportion to ``weights`` by largest remainder, none above its room."""
    shares = [0] * len(room)
    while (left := total - sum(shares)) > 0:
        free = [i for i in range(len(room)) if shares[i] < room[i]]
        # Those of no weight get something only when the others are full; then by room.
        weight = {i: weights[i] for i in free if weights[i]} or {
            i: room[i] - shares[i] for i in free
        }
        whole = sum(weight.values())
        exact = {i: divmod(left * w, whole) for i, w in weight.items()}
        spare = left - sum(quotient for quotient, _ in exact.values())
        by_remainder = sorted(exact, key=lambda i: (-exact[i][1], i))
        for i in exact:
            extra = exact[i][0] + (i in by_remainder[:spare])
            shares[i] = min(room[i], shares[i] + extra)
    return shares


def _parts(
    layout: Layout, grid: tuple[int, int] | None, *, contiguous: bool
) -> tuple[Tensor, list[Tensor], Tensor]:
    """Tokens of the thumbnail, tokens of each tile, and the tile at each token of the thumbnail.

    Raises:
        TokensError: if the grid does not hold the tiles.
    """
    blocks, block = layout.coords[:, 0].unique(return_inverse=True)
    place = layout.coords[:, 2:]
    thumbnail = (block == 0).nonzero().squeeze(1)
    if len(blocks) == 1:
        return thumbnail, [], thumbnail
    own = place[thumbnail] - place[thumbnail].amin(0)
    size = own.amax(0) + 1
    if len(blocks) == 2:
        mosaic = place - place[block == 1].amin(0)
        rows, columns = (mosaic[block == 1].amax(0) // size + 1).tolist()
        cell = (mosaic // size) @ torch.tensor([columns, 1])
        tile = cell.masked_fill(block == 0, -1)
    else:
        count = len(blocks) - 1
        rows = max(r for r in range(1, count + 1) if count % r == 0 and r * r <= count)
        rows, columns = grid or (rows, count // rows)
        if rows * columns != count:
            raise TokensError(f"hired: grid={grid} does not hold {count} tiles.")
        tile = block - 1
    count = rows * columns
    if contiguous:
        seen = torch.arange(len(thumbnail)) // max(1, len(thumbnail) // count)
        seen = seen.clamp(max=count - 1)
    else:
        seen = (own * torch.tensor([rows, columns]) // size) @ torch.tensor([columns, 1])
    return thumbnail, [(tile == t).nonzero().squeeze(1) for t in range(count)], seen
