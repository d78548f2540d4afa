"""Keeps tokens that together cover the prompt and the image.

Idea: kept tokens should answer for every word of the prompt and for every patch of the image. Count
how much of both they cover, and add greedily what covers most of what is still open.

Algorithm, with prompt embeddings t_l, l = 1..L, tokens x_i and tokens v_i in a space of their own:
    1. text coverage c_lj = softmax over j of cos(t_l, x_j) / ``text_temperature``, over L;
    2. image coverage c_ij = softmax over j of cos(v_i, v_j) / ``image_temperature``, times
       ``alpha`` over N;
    3. k times: add the j of largest sum over the L + N rows r of max(0, c_rj - covered_r), then
       covered_r <- max(covered_r, c_rj), from 0.

Shapes: features ``(B, N, D)``, prompt embeddings ``(B, L, D)`` -> picks ``(B, k)`` -> kept
``(B, k, D)``. Cost: O(N^2 D) for the Gram matrix, then O(N + L) for each evaluation of a token;
since gains only shrink, a few evaluations for each pick find the best one. Above 16384 tokens it
refuses.

Deviations from the official code: it evaluates every token for every pick, which finds the same
ones. The v_i are the tokens themselves by default; the official code takes the encoder's output
before the projector (``image="vision_features"``), and its front end sets the temperature of text
to 0.02. Ties go to the lowest index. Tokens equal those of the official code on recorded cases.

Published, LLaVA-1.5-7B in percent of the full model with 192 / 128 / 64 tokens: 98.7 / 97.8 / 96.6
(its table).

```bibtex
@inproceedings{dong2026mmtok,
  title={{MMTok}: Multimodal Coverage Maximization for Efficient Inference of {VLMs}},
  author={Dong, Sixun and Hu, Juhua and Zhang, Mian and Yin, Ming and Fu, Yanjie and Qian, Qi},
  booktitle={International Conference on Learning Representations},
  year={2026},
  eprint={2508.18264},
  archivePrefix={arXiv}
}
```
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from tokenreduce.errors import PipelineError, TokensError
from tokenreduce.ops import gram_matrix, unit_vectors
from tokenreduce.ops.coverage import greedy_coverage
from tokenreduce.ops.limits import MATRIX_LIMIT, require_matrix
from tokenreduce.reducer import Selector
from tokenreduce.tokens import VisualTokens


@dataclass(frozen=True, kw_only=True)
class MMTok(Selector):
    """Keeps the tokens that greedily cover most of the prompt and of the image.

    Args:
        alpha: weight of the image against the prompt, not negative.
        text_temperature: of the softmax by which tokens cover a word, positive.
        image_temperature: of the softmax by which tokens cover a token, at least 0.03.
        image: the signal by whose cosines tokens cover each other; the tokens' own if empty.

    Raises:
        PipelineError: if an option is out of range.
    """

    alpha: float = 0.5
    text_temperature: float = 0.01
    image_temperature: float = 0.2
    image: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.alpha < float("inf"):
            raise PipelineError(f"{self.name}: alpha={self.alpha} must be finite and not negative.")
        for option, least in (("text_temperature", 0.0), ("image_temperature", 0.03)):
            value = getattr(self, option)
            # Far below 0.03, exp(-2 / temperature) is no float32 number any more.
            if not 0 < value < float("inf") or value < least:
                raise PipelineError(
                    f"{self.name}: {option}={value} must be positive and at least {least}."
                )

    @property
    def needs(self) -> tuple[str, ...]:
        return (*super().needs, self.image) if self.image else super().needs

    def select(self, tokens: VisualTokens, k: int) -> Tensor:
        """Pick the tokens that cover most.

        Raises:
            TokensError: above 16384 tokens, or if the prompt lies in another space.
        """
        require_matrix(tokens.count, "coverages")
        features, text = tokens.features.detach(), tokens.signal("prompt_embeddings").detach()
        if text.shape[2] != features.shape[2]:
            raise TokensError(
                f"{self.name}: prompt embeddings of {text.shape[2]} channels cannot be compared "
                f"with tokens of {features.shape[2]}; it runs where tokens are in the LLM's space."
            )
        own = tokens.signal(self.image).detach() if self.image else None
        # As many items at once as fit into one Gram matrix of the largest size.
        together = max(1, MATRIX_LIMIT**2 // tokens.count**2)
        parts = [slice(start, start + together) for start in range(0, tokens.batch, together)]
        return torch.cat(
            [
                self._pick(features[part], text[part], None if own is None else own[part], k)
                for part in parts
            ]
        )

    def _pick(self, features: Tensor, text: Tensor, own: Tensor | None, k: int) -> Tensor:
        """Greedy picks ``(b, k)`` of items of features, words and, if any, vectors of their own."""
        batch, n, _ = features.shape
        unit = unit_vectors(features)
        words = ((unit_vectors(text) @ unit.mT) / self.text_temperature).softmax(dim=2).mT
        words = words / text.shape[1]
        unit = unit if own is None else unit_vectors(own)
        # Row j of the table: how much token j covers each token, then each word.
        table = unit.new_empty(batch, n, n + text.shape[1])
        cover = gram_matrix(unit, out=table[..., :n])
        # Numerators of the softmax; symmetric, so that a row serves as a column.
        cover.sub_(1).div_(self.image_temperature).exp_()
        cover.mul_((self.alpha / n / cover.sum(2))[:, None])
        table[..., n:] = words
        # Beside the table the unit vectors are not needed.
        del unit, words
        # The rows sum to 1 + alpha over all tokens; times N, the gains are of order 1.
        return greedy_coverage(table, k, weight=torch.full_like(table[..., 0], n))
