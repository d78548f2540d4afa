"""Drops the tokens that the words of the prompt leave out of their attention.

Idea: a word needs not all of the image. ADEM-VL lets text attend to visual tokens without any
trained projection, and each word leaves out those that it is least similar to. A token that every
word leaves out is read by nobody, and need not be there.

Algorithm, with prompt embeddings t_l, l = 1..L, tokens x_i in the space of the LLM, and f = SiLU:
    1. a_li = f(t_l) . f(x_i), the similarity of word and token;
    2. word l leaves out the floor(p N) tokens of smallest a_li: its mask m_li = 0, else 1
       (``tokenreduce.ops.drop_mask``);
    3. without a budget, keep the tokens with some m_li = 1;
    4. with a budget of k, keep the k tokens of largest sum_l m_li, that is, those that most words
       leave in; among equals, those of largest mean a_li.
p is ``share``; by default a tenth, as published, and with a budget the share that it drops, so that
each word leaves in k tokens.

Shapes: features ``(B, N, D)``, prompt embeddings ``(B, L, D)`` -> kept ``(B, k, D)``. Cost:
O(N L (D + log N)).

ADEM-VL is a model that is tuned: its text attends to visual tokens beside the LLM's sequence, and a
mask for each word zeroes single weights there. Removal is the part of it that fits any model, and
it is coarser: what only some words leave out stays for all of them. Step 3 loses nothing of the
masked attention: sum_i m_li a_li x_i is the same over the kept tokens. Step 4 is a choice of this
implementation, as are prompt embeddings in place of the states of a layer. The pooling of the image
at several scales, which ADEM-VL adds to its tokens, is not part of it. Written from a description;
the official code, which has no licence, was not read. Ties go to the lowest index.

Published: with tuning: ScienceQA 94.01, MME perception 969.7, COCO captions CIDEr 130.1
(its tables); nothing for this form.

```bibtex
@article{hao2024adem,
  title={{ADEM-VL}: Adaptive and Embedded Fusion for Efficient Vision-Language Tuning},
  author={Hao, Zhiwei and Guo, Jianyuan and Shen, Li and Luo, Yong and Hu, Han and Wen, Yonggang},
  journal={arXiv preprint arXiv:2410.17779},
  year={2024}
}
```
"""

from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

from torch import Tensor
from torch.nn import functional

from tokenreduce.capabilities import CountClass
from tokenreduce.errors import PipelineError, TokensError
from tokenreduce.ops import top_k_indices
from tokenreduce.ops.drop_mask import lowest_share_mask
from tokenreduce.ops.quotas import kept_indices
from tokenreduce.ops.similarity import SMALLEST_NORM
from tokenreduce.reducer import Reducer
from tokenreduce.reduction import Reduction
from tokenreduce.tokens import VisualTokens


@dataclass(frozen=True, kw_only=True)
class TextDropMask(Reducer):
    """Drops the tokens that the words of the prompt leave out.

    Args:
        share: of the tokens that each word leaves out, in [0, 1). If None, a tenth, or what a
            budget drops.

    Raises:
        PipelineError: if ``share`` is out of range.
    """

    adaptive: ClassVar[bool] = True

    share: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.share is not None and not 0 <= self.share < 1:
            raise PipelineError(f"{self.name}: share={self.share} must be in [0, 1).")

    @property
    def count_class(self) -> CountClass:
        return "adaptive" if self.budget is None else "exact"

    def reduce(self, tokens: VisualTokens) -> Reduction:
        similarity = self._similarity(tokens)
        if self.budget is None:
            left_out = lowest_share_mask(similarity, 0.1 if self.share is None else self.share)
            return Reduction.from_kept(tokens, kept_indices(~left_out.all(1)))
        k = self.count(tokens.count)
        share = Fraction(tokens.count - k, tokens.count) if self.share is None else self.share
        votes = (~lowest_share_mask(similarity, share)).sum(1)
        mean = similarity.mean(1)
        # Less than half a vote.
        among_equals = mean / (mean.abs().amax(1, keepdim=True) * 2.1).clamp(min=SMALLEST_NORM)
        return Reduction.from_kept(tokens, top_k_indices(votes + among_equals, k))

    def _similarity(self, tokens: VisualTokens) -> Tensor:
        """``(B, L, N)`` similarity of words and tokens."""
        text = tokens.signal("prompt_embeddings").detach().float()
        if text.shape[2] != tokens.features.shape[2]:
            raise TokensError(
                f"{self.name}: prompt embeddings of {text.shape[2]} channels cannot be compared "
                f"with tokens of {tokens.features.shape[2]}; it runs where tokens are in the LLM's "
                "space."
            )
        return functional.silu(text) @ functional.silu(tokens.features.detach().float()).mT
