"""Keeps the most diverse tokens: greedy max-min cosine distance.

Idea: after an encoder, many tokens say nearly the same. Choose the subset whose two nearest members
are as far apart as possible; what is dropped then has a near twin among what is kept.

Algorithm, with d(i, j) = 1 - cos(x_i, x_j):
    1. S = {argmax_i min_{j != i} d(i, j)}: the token whose nearest neighbour is farthest;
    2. repeat k - 1 times: add argmax_{i not in S} min_{j in S} d(i, j);
    3. output S in source order. Ties go to the lowest index.

Shapes: features ``(B, N, D)`` -> picks ``(B, k)`` -> kept ``(B, k, D)``. Cost: O(N^2 D) for the
Gram matrix, then O(k N). Beyond 16384 tokens no N x N matrix is held: tiles of it find the first
pick, and the greedy steps multiply the tokens by those picked, O(k N D).

Deviations from the official code: batches (it takes one image); float32 cosines under half
precision; distances within 2.5e-7 count as ties. Picks equal those of the official code on recorded
cases.

Published: LLaVA-1.5-7B, average of 9 benchmarks, full model 64.9: 62.5 with 128 tokens, 60.9 with
64, 58.4 with 32 (table of the EADP paper). In percent of the full model with 192 / 128 / 64 tokens:
98.0 / 96.9 / 94.8 (table of the MMTok paper).

```bibtex
@inproceedings{alvar2025divprune,
  title={DivPrune: Diversity-based Visual Token Pruning for Large Multimodal Models},
  author={Alvar, Saeed Ranjbar and Singh, Gursimran and Akbari, Mohammad and Zhang, Yong},
  booktitle={Proceedings of the IEEE/CVF Conference on Computer Vision and Pattern Recognition},
  year={2025},
  eprint={2503.02175},
  archivePrefix={arXiv}
}
```
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from tokenreduce.ops import farthest_first, first_argmax, gram_matrix, unit_vectors
from tokenreduce.ops.similarity import closest_cosine
from tokenreduce.reducer import Selector
from tokenreduce.tokens import VisualTokens

#: Most tokens whose Gram matrix is held: 16384 need 1 GiB.
GRAM_LIMIT = 16384


@dataclass(frozen=True, kw_only=True)
class DivPrune(Selector):
    """Keeps the tokens that greedy max-min cosine distance picks."""

    def select(self, tokens: VisualTokens, k: int) -> Tensor:
        unit = unit_vectors(tokens.features.detach())
        if tokens.count > GRAM_LIMIT:
            return farthest_first(unit, k, first=first_argmax(-closest_cosine(unit), scale=1.0))
        # As many items at once as fit into one Gram matrix of the largest size.
        together = max(1, GRAM_LIMIT**2 // tokens.count**2)
        return torch.cat([_pick_from_gram(part, k) for part in unit.split(together)])


def _pick_from_gram(unit: Tensor, k: int) -> Tensor:
    gram = gram_matrix(unit)
    # A token is no neighbour of its own; the greedy steps never look at a picked token again.
    gram.diagonal(dim1=1, dim2=2).fill_(-torch.inf)
    first = first_argmax(-gram.amax(dim=2), scale=1.0)
    return farthest_first(unit, k, first=first, gram=gram)
