"""Answer several questions about an image in one forward pass.

The sequence is ``<s>``, the visual tokens, then the questions one after another. A question sees
the prefix and itself but no other question, and its positions continue after the unreduced image,
so that every answer is the one that the question would get in a prompt of its own. The prefix,
which is most of the sequence, is computed once for all questions.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration, LlavaOnevisionForConditionalGeneration

from .scenes import GRID_SIZE
from .vocabulary import BOS, PAD, TOKEN_IDS, WORDS, encode_turn

IMAGE_TOKENS = GRID_SIZE**2
"""Visual tokens of an image before any reduction; they are at positions 1 to 144."""

Answering = LlavaForConditionalGeneration | LlavaOnevisionForConditionalGeneration
"""A testbed model, which sees images or clips."""


@dataclass(frozen=True)
class PackedQuestions:
    """Tokenised questions of a batch of images, padded on the right.

    Attributes:
        input_ids: Token ids, int64 ``(B, Q, L)``.
        lengths: Number of tokens of each question without padding, int64 ``(B, Q)``; 0 where an
            image has fewer questions than others.
    """

    input_ids: Tensor
    lengths: Tensor

    @classmethod
    def from_texts(cls, texts: Sequence[Sequence[str]]) -> "PackedQuestions":
        """Tokenise the questions of each image."""
        turns = [[encode_turn(text) for text in row] for row in texts]
        columns = max((len(row) for row in turns), default=0)
        width = max((len(turn) for row in turns for turn in row), default=0)
        input_ids = torch.full((len(turns), columns, width), TOKEN_IDS[PAD])
        lengths = torch.zeros(len(turns), columns, dtype=torch.long)
        for i, row in enumerate(turns):
            for j, turn in enumerate(row):
                input_ids[i, j, : len(turn)] = torch.tensor(turn)
                lengths[i, j] = len(turn)
        return cls(input_ids, lengths)


def packed_mask(visual_tokens: int, questions: int, width: int) -> Tensor:
    """Which token sees which.

    Args:
        visual_tokens: Number of visual tokens V.
        questions: Number of questions Q.
        width: Tokens of a question with its padding, L.

    Returns:
        bool ``(T, T)`` with ``T = 1 + V + Q * L``, true where the row's token sees the column's.
    """
    prefix = 1 + visual_tokens
    total = prefix + questions * width
    causal = torch.ones(total, total, dtype=torch.bool).tril()
    block = torch.arange(total).sub(prefix).div(max(width, 1), rounding_mode="floor")
    block[:prefix] = -1
    same_block = block[:, None] == block[None, :]
    return causal & (same_block | (block == -1)[None, :])


def packed_inputs(
    model: Answering,
    features: Tensor,
    positions: Tensor,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    unreduced: int = IMAGE_TOKENS,
) -> dict[str, Tensor]:
    """Arguments that make the language model read visual tokens, then independent questions.

    Args:
        model: The model whose language model will be called.
        features: Visual tokens in the language model's space (after the projector and any
            reduction), ``(B, V, D)``.
        positions: Position of each visual token in the unreduced prompt, int64 ``(B, V)``; the
            patch with row-major index ``i`` is at position ``1 + i``.
        input_ids: Token ids of the questions, int64 ``(B, Q, L)``.
        attention_mask: Additive mask that broadcasts to ``(B, heads, T, T)``, made from
            `packed_mask` if None.
        unreduced: Visual tokens in the unreduced prompt, after which the questions continue.

    Returns:
        ``inputs_embeds`` of shape ``(B, T, D)``, ``attention_mask`` and ``position_ids``.
    """
    batch, visual, _ = features.shape
    questions, width = input_ids.shape[1:]
    device = features.device
    start = torch.full((batch, 1), TOKEN_IDS[BOS], device=device)
    token_ids = torch.cat([start, input_ids.reshape(batch, -1)], 1)
    text = model.model.language_model.embed_tokens(token_ids)
    after = torch.arange(1 + unreduced, 1 + unreduced + width, device=device)
    if attention_mask is None:
        attention_mask = additive(packed_mask(visual, questions, width), text.dtype).to(device)
    return {
        "inputs_embeds": torch.cat([text[:, :1], features.to(text.dtype), text[:, 1:]], 1),
        "attention_mask": attention_mask,
        "position_ids": torch.cat(
            [torch.zeros_like(start), positions, after.repeat(questions).expand(batch, -1)], 1
        ),
    }


def packed_hidden_states(
    model: Answering,
    features: Tensor,
    positions: Tensor,
    input_ids: Tensor,
    unreduced: int = IMAGE_TOKENS,
) -> Tensor:
    """Last hidden states of the questions, ``(B, Q, L, D)``; see `packed_inputs`."""
    inputs = packed_inputs(model, features, positions, input_ids, unreduced=unreduced)
    hidden: Tensor = model.model.language_model(**inputs, use_cache=False).last_hidden_state
    return hidden[:, 1 + features.shape[1] :].reshape(*input_ids.shape, -1)


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Turn a bool ``(T, T)`` mask into an additive ``(1, 1, T, T)`` one."""
    zeros = torch.zeros(1, 1, *mask.shape, dtype=dtype)
    return zeros.masked_fill(~mask, torch.finfo(dtype).min)


@torch.no_grad()
def answer(
    model: Answering,
    features: Tensor,
    positions: Tensor,
    texts: Sequence[Sequence[str]],
    unreduced: int = IMAGE_TOKENS,
) -> list[list[str]]:
    """Answer every question about every image from the image's visual tokens.

    Args:
        model: The model that answers.
        features: Visual tokens after the projector and any reduction, ``(B, V, D)``.
        positions: Positions of the visual tokens in the unreduced prompt, int64 ``(B, V)``.
        texts: The questions of each image.
        unreduced: Visual tokens in the unreduced prompt.

    Returns:
        For each image and question the first word of the greedy answer.

    Raises:
        ValueError: The batch sizes or the number of visual tokens disagree.
    """
    if features.shape[:2] != positions.shape or len(texts) != len(features):
        raise ValueError(
            f"features {tuple(features.shape)}, positions {tuple(positions.shape)} and questions "
            f"of {len(texts)} images do not belong together"
        )
    packed = PackedQuestions.from_texts(texts)
    input_ids, lengths = packed.input_ids.to(features.device), packed.lengths.to(features.device)
    hidden = packed_hidden_states(model, features, positions, input_ids, unreduced)
    last = (lengths - 1).clamp(min=0)[..., None, None].expand(-1, -1, 1, hidden.shape[-1])
    logits = model.lm_head(hidden.gather(2, last).squeeze(2))
    words = logits.argmax(-1).tolist()
    return [[WORDS[w] for w in row[: len(asked)]] for row, asked in zip(words, texts, strict=True)]


def image_positions(batch: int, tokens: int = IMAGE_TOKENS) -> Tensor:
    """Positions of the visual tokens of unreduced images or clips, int64 ``(batch, tokens)``."""
    return torch.arange(1, 1 + tokens).expand(batch, -1)
