"""AIM, pruning part: keeps the tokens of highest PageRank in the attention of an LLM layer.

Idea: attention says where information flows. A walk that follows it comes by important tokens
often, be it directly or by way of others; text and visual tokens are all nodes of the graph, and
only visual ones are pruned.

Algorithm, at each cut, with attention logits L of all tokens of the prompt, per head:
    1. M = row softmax of L / 0.1; p starts with equal shares; five times p <- p M;
    2. importance of a token = root of the mean square of p over heads;
    3. keep the k visual tokens of largest importance.
The cuts are one stage at the decoder site. The paper keeps all tokens up to layer l1, a share that
falls linearly to zero at l2, and none after it: for a video and a model of 28 layers, l1 = 14 and
l2 = 22, so ``schedule={15: 0.875, 16: 0.75, ..., 22: 0}``. Merging before the LLM is `aim`.

Shapes: PageRank ``(B, N)`` -> kept ``(B, k, D)``. Cost: O(N); the signal itself takes a matrix of
the prompt for each head, which is what the method costs.

Deviations from the official code: batches; counts are rounded half up; ties go to the lowest index.
The importance equals the official code on recorded cases.

Published, LLaVA-OneVision-7B, both parts together: VideoMME 58.2 (full model 58.2), MLVU 63.7
(64.7), EgoSchema 59.6 (60.1) at 14.76 of 99.63 TFLOPs (its own table).

```bibtex
@inproceedings{zhong2025aim,
  title={{AIM}: Adaptive Inference of Multi-Modal {LLMs} via Token Merging and Pruning},
  author={Zhong, Yiwu and Liu, Zhuoming and Li, Yin and Wang, Liwei},
  booktitle={Proceedings of the IEEE/CVF International Conference on Computer Vision},
  year={2025},
  eprint={2412.03248},
  archivePrefix={arXiv}
}
```
"""

from dataclasses import dataclass

from torch import Tensor

from tokenreduce.reducer import Scorer
from tokenreduce.tokens import VisualTokens


@dataclass(frozen=True, kw_only=True)
class AIMPrune(Scorer):
    """Keeps the tokens of highest PageRank in the attention of an LLM layer."""

    def score(self, tokens: VisualTokens) -> Tensor:
        # Rounding errors of attention are relative: beside one large value, small ones would tie.
        return tokens.signal("attention_page_rank").float().log()
