"""Groups tokens around density peaks, without training.

Idea: an image shows a few things, each on many patches. Patches of one thing lie close together in
feature space; where they are densest is its centre. Let one token stand for each.

Algorithm, with a budget of k:
    1. density of a token: exp(-mean squared distance to its ``neighbors`` nearest tokens, itself
       included), Euclidean over sqrt(D);
    2. its score is its density times the distance to the nearest denser token;
    3. the k tokens of largest score are centres, the others join the nearest centre;
    4. each group becomes its size-weighted mean, at the place of its centre.

Shapes: features ``(B, N, D)`` -> groups ``(B, N)`` -> merged ``(B, k, D)``. Cost: O(N^2 D) for the
distances. Above 16384 tokens it refuses.

The training-free sibling of ``token-grouping``, which loads learned semantic tokens; density peak
clustering is due to Rodriguez and Laio, its nearest-neighbour form to Du et al. No method for
multimodal models goes by this alone. Ties go to the lowest index.

```bibtex
@article{du2016dpcknn,
  title={Study on Density Peaks Clustering Based on k-Nearest Neighbors and Principal Component
         Analysis},
  author={Du, Mingjing and Ding, Shifei and Jia, Hongjie},
  journal={Knowledge-Based Systems},
  volume={99},
  pages={135--145},
  year={2016}
}
```
"""

from dataclasses import dataclass

import torch

from tokenreduce.errors import PipelineError
from tokenreduce.ops.density_peaks import density_peaks
from tokenreduce.ops.quotas import kept_indices
from tokenreduce.reducer import Grouping, Merger
from tokenreduce.tokens import VisualTokens


@dataclass(frozen=True, kw_only=True)
class DensityPeakGrouping(Merger):
    """Merges groups of tokens around density peaks.

    Args:
        neighbors: how many nearest tokens the density is taken over, at least 1.

    Raises:
        PipelineError: if ``neighbors`` is out of range.
    """

    neighbors: int = 7

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.neighbors < 1:
            raise PipelineError(f"{self.name}: neighbors={self.neighbors} must be at least 1.")

    def assign(self, tokens: VisualTokens, k: int) -> Grouping:
        counts = torch.full((tokens.batch,), k)
        peaks = density_peaks(tokens.features.detach(), counts, neighbors=self.neighbors)
        positions = kept_indices(peaks.centres)
        return Grouping(torch.searchsorted(positions, peaks.centre_of), positions)
