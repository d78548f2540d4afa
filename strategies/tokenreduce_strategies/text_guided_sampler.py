"""Keeps the tokens that the words of the prompt are most similar to.

Idea: where tokens and words lie in one space, each word can look for its tokens before the LLM
runs. Add up where all words look, and keep those places.

Algorithm, with prompt embeddings t_l, l = 1..L, and tokens x_i in the space of the LLM:
    1. a_li = softmax over i of cos(t_l, x_i) / ``temperature``: where word l looks;
    2. s_i = mean of a_li over l; keep the k tokens of largest s_i.

Shapes: features ``(B, N, D)``, prompt embeddings ``(B, L, D)`` -> kept ``(B, k, D)``. Cost:
O(N L D).

FocusLLaVA has a text-guided sampler inside the LLM, beside a trained one in the projector. This is
not that system but the part of its idea that needs no training, before the LLM: selection by
similarity to the prompt. There is no official code; cosines and the temperature are choices of this
implementation. Ties go to the lowest index.

Published: none for this form.

```bibtex
@article{zhu2024focusllava,
  title={{FocusLLaVA}: A Coarse-to-Fine Approach for Efficient and Effective Visual Token
         Compression},
  author={Zhu, Yuke and Xie, Chi and Liang, Shuang and Zheng, Bo and Guo, Sheng},
  journal={arXiv preprint arXiv:2411.14228},
  year={2024}
}
```
"""

from dataclasses import dataclass

from torch import Tensor

from tokenreduce.errors import PipelineError, TokensError
from tokenreduce.ops import unit_vectors
from tokenreduce.ops.similarity import SMALLEST_NORM
from tokenreduce.reducer import Scorer
from tokenreduce.tokens import VisualTokens


@dataclass(frozen=True, kw_only=True)
class TextGuidedSampler(Scorer):
    """Keeps the tokens that words of the prompt are most similar to.

    Args:
        temperature: how sharply a word looks at its nearest tokens, at least 0.01.

    Raises:
        PipelineError: if ``temperature`` is out of range.
    """

    temperature: float = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.01 <= self.temperature < float("inf"):
            raise PipelineError(
                f"{self.name}: temperature={self.temperature} must be finite and at least 0.01."
            )

    def score(self, tokens: VisualTokens) -> Tensor:
        text = unit_vectors(tokens.signal("prompt_embeddings").detach())
        if text.shape[2] != tokens.features.shape[2]:
            raise TokensError(
                f"{self.name}: prompt embeddings of {text.shape[2]} channels cannot be compared "
                f"with tokens of {tokens.features.shape[2]}; it runs where tokens are in the LLM's "
                "space."
            )
        features = tokens.features.detach().float()
        # Dividing the products instead of the features saves a copy of them.
        length = features.norm(dim=2).clamp(min=SMALLEST_NORM)
        cosine = (text @ features.mT) / length[:, None]
        looks = (cosine / self.temperature).log_softmax(dim=2)
        # Logarithms, so that tokens that few words look at do not all tie.
        total: Tensor = looks.logsumexp(dim=1)
        return total
