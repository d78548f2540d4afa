"""FrameFusion, pruning part: keeps the tokens that get most attention from all others.

Idea: once a few layers have merged what repeats from frame to frame, few tokens are alike any more.
What is still too much goes by importance, judged in the layer at hand.

Algorithm, after a layer of the LLM:
    1. a_i = attention that visual token i gets from all tokens, averaged over heads and queries;
    2. keep the k tokens of largest a_i.

Shapes: attention ``(B, N)`` -> kept ``(B, k, D)``. Cost: O(N); the features are not read.

Deviations from the official code: it derives the count from a cost and from how much each layer
before has merged; here the budget says it. The whole method is ``framefusion`` at one decoder layer
or more, then this. Ties go to the lowest index. Tokens equal those of the official code on recorded
cases.

Published: see ``framefusion``.

```bibtex
@inproceedings{fu2025framefusion,
  title={{FrameFusion}: Combining Similarity and Importance for Video Token Reduction on Large
         Vision Language Models},
  author={Fu, Tianyu and Liu, Tengxuan and Han, Qinghao and Dai, Guohao and Yan, Shengen and
          Yang, Huazhong and Ning, Xuefei and Wang, Yu},
  booktitle={Proceedings of the IEEE/CVF International Conference on Computer Vision},
  year={2025},
  eprint={2501.01986},
  archivePrefix={arXiv}
}
```
"""

from dataclasses import dataclass

from torch import Tensor

from tokenreduce.reducer import Scorer
from tokenreduce.tokens import VisualTokens


@dataclass(frozen=True, kw_only=True)
class FrameFusionPrune(Scorer):
    """Keeps the tokens that get most attention from all others."""

    def score(self, tokens: VisualTokens) -> Tensor:
        # Rounding errors of attention are relative: beside one large value, small ones would tie.
        return tokens.signal("decoder_received_attention").float().log()
