"""Keeps the tokens that the class token attends to most.

Idea: in the last layers of a CLIP-like encoder the class token gathers what the image is about, so
its attention says which patches matter. It is known before the language model runs, and unlike the
attention of text tokens inside the language model it is not drawn to the end of the sequence.

Algorithm:
    1. a_i = attention of the class token to token i in the layer that the projector reads, averaged
       over heads;
    2. keep the k tokens of largest a_i, ties to the lowest index, in source order.

Shapes: class attention ``(B, N)`` -> kept ``(B, k, D)``. Cost: O(N); the features are not read.

Deviations from the official code: none. Picks equal those of the official code on recorded cases.
The same repository and paper later became VisPruner, which adds diverse tokens.

Published: no comparable table.

```bibtex
@article{zhang2024fastervlm,
  title={[{CLS}] Attention is All You Need for Training-Free Visual Token Pruning: Make {VLM}
         Inference Faster},
  author={Zhang, Qizhe and Cheng, Aosong and Lu, Ming and Zhuo, Zhiyong and Wang, Minqi and
          Cao, Jiajun and Guo, Shaobo and She, Qi and Zhang, Shanghang},
  journal={arXiv preprint arXiv:2412.01818},
  year={2024}
}
```
"""

from dataclasses import dataclass

from torch import Tensor

from tokenreduce.reducer import Scorer
from tokenreduce.tokens import VisualTokens


@dataclass(frozen=True, kw_only=True)
class FasterVLM(Scorer):
    """Keeps the tokens of largest class attention."""

    def score(self, tokens: VisualTokens) -> Tensor:
        # Rounding errors of attention are relative: beside one large value, small ones would tie.
        return tokens.signal("class_attention").float().log()
