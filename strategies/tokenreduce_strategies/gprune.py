"""Keeps tokens in which information gathers on a graph of similar tokens.

Idea: tokens that are alike form a graph. Let information flow along it for some rounds; where much
arrives, relative to the number of neighbours, a token represents others, on the main object and on
the background alike.

Algorithm, with cosines c_ij:
    1. edges where c_ij >= ``similarity``; A = row-wise softmax of c_ij / ``temperature`` over the
       edges;
    2. v = (|x_1|, ..., |x_N|), then v <- v A, ``iterations`` times;
    3. score_i = v_i / number of edges of i; keep the k tokens of largest score.

Shapes: features ``(B, N, D)`` -> scores ``(B, N)`` -> kept ``(B, k, D)``. Cost: O(N^2 D) for the
Gram matrix, O(N^2) for each iteration. Beyond 16384 tokens the matrix is recomputed in tiles, once
for each iteration.

Deviations from the official code: a vector is propagated instead of raising A to a power; zero
vectors count as their own only neighbour; cosines within 2.5e-7 below ``similarity`` are edges. It
runs separately on thumbnail and tiles: wrap this in ``per_tile`` for the same. Tokens and scores
equal those of the official code on recorded cases.

Published: no comparable table.

```bibtex
@inproceedings{jiang2025gprune,
  title={What Kind of Visual Tokens Do We Need? Training-free Visual Token Pruning for Multi-modal
         Large Language Models from the Perspective of Graph},
  author={Jiang, Yutao and Wu, Qiong and Lin, Wenhao and Yu, Wei and Zhou, Yiyi},
  booktitle={Proceedings of the AAAI Conference on Artificial Intelligence},
  year={2025},
  eprint={2501.02268},
  archivePrefix={arXiv}
}
```
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from tokenreduce.errors import PipelineError
from tokenreduce.ops import TIE_TOLERANCE, gram_matrix, unit_vectors
from tokenreduce.reducer import Scorer
from tokenreduce.tokens import VisualTokens

#: Most tokens whose Gram matrix is held: 16384 need 1 GiB.
GRAM_LIMIT = 16384
#: Entries of one tile: 512 Ki float32 values, 2 MiB, which stay in a processor's cache.
TILE_ENTRIES = 1 << 19
#: Rows of the Gram matrix that are computed together where it is not held.
ROWS = 512


@dataclass(frozen=True, kw_only=True)
class GPrune(Scorer):
    """Keeps the tokens that gather most information on a similarity graph.

    Args:
        similarity: smallest cosine of an edge, in (0, 1].
        temperature: of the softmax over edges, positive.
        iterations: how often information is passed on, at least 1.

    Raises:
        PipelineError: if an option is out of range.
    """

    similarity: float = 0.5
    temperature: float = 0.03
    iterations: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.similarity <= 1:
            raise PipelineError(f"{self.name}: similarity={self.similarity} must lie in (0, 1].")
        if not 0 < self.temperature < float("inf"):
            raise PipelineError(
                f"{self.name}: temperature={self.temperature} must be positive and finite."
            )
        if self.iterations < 1:
            raise PipelineError(f"{self.name}: iterations={self.iterations} must be at least 1.")

    def score(self, tokens: VisualTokens) -> Tensor:
        features = tokens.features.detach().float()
        # As many items at once as fit into one Gram matrix of the largest size.
        together = max(1, GRAM_LIMIT**2 // tokens.count**2)
        return torch.cat([self._score(part) for part in features.split(together)])

    def _score(self, features: Tensor) -> Tensor:
        batch, n, _ = features.shape
        unit = unit_vectors(features)
        information: Tensor = torch.linalg.vector_norm(features, dim=2)
        rows = max(1, TILE_ENTRIES // (batch * n))
        held = n <= GRAM_LIMIT
        if held:
            # The unit vectors are not needed beside their Gram matrix.
            gram = gram_matrix(unit)
            del unit
        totals, degrees = torch.empty_like(information), torch.empty_like(information)
        for iteration in range(self.iterations):
            arriving = torch.zeros_like(information)
            tiles = (gram,) if held else (part @ unit.mT for part in unit.split(ROWS, dim=1))
            end = 0
            for edges in (edges for tile in tiles for edges in tile.split(rows, dim=1)):
                own = slice(end, end := end + edges.shape[1])
                if iteration == 0 or not held:
                    totals[:, own], degrees[:, own] = self._weigh(edges)
                leaving = information[:, own] / totals[:, own]
                arriving += (leaving[:, None] @ edges).squeeze(1)
            information = arriving
        return information / degrees.clamp(min=1)

    def _weigh(self, edges: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines ``(b, n, N)`` become weights, up to a factor for each row.

        Returns:
            sums of the weights of each row, and their numbers.
        """
        least = self.similarity - TIE_TOLERANCE
        degree = (edges > least).sum(2, dtype=torch.int32)
        # The largest cosine of a row is its own, 1, so that the softmax does not overflow.
        torch.nn.functional.threshold(edges, least, -torch.inf, inplace=True)
        edges.sub_(1).div_(self.temperature).exp_()
        return edges.sum(2).clamp(min=torch.finfo(torch.float32).tiny), degree
