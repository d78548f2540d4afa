"""The functional core of the attachment: from which tokens stay to what the decoder computes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tokenreduce.errors import MediaError, UnsupportedModel
from tokenreduce.reduction import Reduction


class SequencePlan(NamedTuple):
    """A shorter padded sequence, made of columns of a longer one.

    Attributes:
        columns: ``(B, S')`` column of the given sequence at each place of the shorter one.
        valid: ``(B, S')`` False where a place is padding.
    """

    columns: Tensor
    valid: Tensor

    def tail(self, length: int) -> Tensor:
        """How many columns at the end of a sequence of ``length`` stay in their order, all of them.

        Returns:
            an integer scalar, which is not waited for.
        """
        end = torch.arange(length - self.columns.shape[1], length, device=self.columns.device)
        same = ((self.columns == end) & self.valid).all(0)
        return same.flip(0).cumprod(0).sum()


class ReducedItem(NamedTuple):
    """A visual item and what became of it.

    Attributes:
        prompt: its row in the batch.
        columns: ``(N,)`` columns of its tokens in the given sequence.
        reduction: a batch of one; None where every token stayed.
    """

    prompt: int
    columns: Tensor
    reduction: Reduction | None


def plan_sequence(keep: Tensor, *, pad_right: bool) -> SequencePlan:
    """Gather the kept columns of each row, padded to the longest row.

    Args:
        keep: ``(B, S)`` columns that stay; at least one in each row.
        pad_right: on which side shorter rows are padded.
    """
    longest = int(keep.sum(1).max())
    order = (~keep if pad_right else keep).to(torch.uint8).argsort(dim=1, stable=True)
    columns = order[:, :longest] if pad_right else order[:, keep.shape[1] - longest :]
    return SequencePlan(columns, keep.gather(1, columns))


def gather_outputs(
    embeds: Tensor, tokens: Tensor, items: Sequence[ReducedItem]
) -> tuple[SequencePlan, Tensor]:
    """The shorter sequence: text, and what the stages left of the visual items.

    Args:
        embeds: ``(B, S, D)`` embeddings, or hidden states, of the given sequence.
        tokens: ``(B, S)`` False where it is padded.
        items: every visual item of the sequence, and what became of it.

    Returns:
        the plan, and ``(B, S', D)`` with zeros where it is padded.
    """
    rows, columns, merged = [], [], []
    keep = tokens.clone()
    for item in items:
        reduction = item.reduction
        if reduction is None:
            continue
        keep[item.prompt, item.columns] = False
        kept = item.columns[reduction.positions[0]]
        owner = torch.full_like(kept, item.prompt)
        rows.append(owner)
        columns.append(kept)
        if not reduction.gathers:
            merged.append((owner, kept, reduction.features[0]))
    kept_rows, kept_columns = torch.cat(rows), torch.cat(columns)
    # What the caller masked out stays out, whatever a strategy chose.
    keep[kept_rows, kept_columns] = tokens[kept_rows, kept_columns]
    if any(item.reduction is not None and item.reduction.kept == 0 for item in items):
        empty = (~keep.any(1)).nonzero().flatten().tolist()
        if empty:
            raise MediaError(
                f"prompt {empty[0]} consists of visual tokens alone, and a stage drops them all: "
                "nothing would be left to answer. Ask something, or keep at least one token."
            )
    if merged:
        place_rows, place_columns, features = (
            torch.cat(parts) for parts in zip(*merged, strict=True)
        )
        embeds = embeds.index_put((place_rows, place_columns), features.to(embeds.dtype))
    pad_right = not bool(tokens[:, -1].all()) and bool(tokens[:, 0].all())
    plan = plan_sequence(keep, pad_right=pad_right)
    shorter = embeds.gather(1, plan.columns[..., None].expand(-1, -1, embeds.shape[-1]))
    return plan, shorter * plan.valid[..., None].to(shorter.dtype)


def gather_positions(position_ids: Tensor, plan: SequencePlan) -> Tensor:
    """Original positions of the planned columns.

    Args:
        position_ids: ``(B or 1, S)``, or with leading axes (``(3, B, S)`` and ``(4, B, S)`` of
            multimodal rotary embeddings).
        plan: the plan.

    Returns:
        ``(..., B, S')``.
    """
    batch = plan.columns.shape[0]
    position_ids = position_ids.expand(*position_ids.shape[:-2], batch, position_ids.shape[-1])
    columns = plan.columns.to(position_ids.device)
    return position_ids.gather(-1, columns.expand(*position_ids.shape[:-1], columns.shape[-1]))


def text_row_positions(valid: Tensor, past_valid: Tensor) -> Tensor:
    """Contiguous positions of a padded sequence that follows cached slots.

    Row 0 of four-row multimodal positions feeds only masks and packed-sequence detection, which
    takes a gap for the boundary of a packed sample.

    Args:
        valid: ``(B, S')`` tokens of the sequence.
        past_valid: ``(B, L)`` tokens in the cache.
    """
    return (past_valid.sum(1, keepdim=True) + valid.long().cumsum(1) - 1).clamp(min=0)


def restore_length(hidden: Tensor, plan: SequencePlan, length: int) -> Tensor:
    """Hidden states of the given length: each column shows the last kept column at or before it.

    So the logits that predict a kept token are those of its predecessor in the shorter sequence,
    and labels, losses and slices keep their meaning.

    Args:
        hidden: ``(B, S', D)``.
        plan: the plan.
        length: S, the length of the given sequence.
    """
    batch, kept, width = hidden.shape
    place = torch.arange(kept, device=hidden.device).expand(batch, -1) * plan.valid
    last = torch.zeros(batch, length, dtype=torch.long, device=hidden.device)
    last.scatter_reduce_(1, plan.columns * plan.valid, place, "amax")
    last = last.cummax(dim=1).values
    return hidden.gather(1, last[..., None].expand(-1, -1, width))


def query_mask(attention_mask: object, past: int, batch: int, length: int) -> Tensor | None:
    """Which of the new tokens the caller calls padding, as ``(B, S)``; None if none.

    Args:
        attention_mask: None, ``(B, past + S)``, a four-dimensional mask ``(B, 1, S, past + S)``, or
            a mapping of those by kind of attention.
        past: length of the cached sequence as the caller knows it.
        batch: B.
        length: S.

    Raises:
        UnsupportedModel: if the mask spans less than the sequence.
    """
    if isinstance(attention_mask, dict):
        attention_mask = attention_mask.get("full_attention", next(iter(attention_mask.values())))
    if not isinstance(attention_mask, Tensor):
        return None
    if attention_mask.ndim == 4:
        if attention_mask.shape[-1] < past + length:
            raise UnsupportedModel(
                f"an attention mask of {attention_mask.shape[-1]} columns for a sequence of "
                f"{past + length} tokens (a static cache with a sliding window?): use the default "
                "dynamic cache while a pipeline is attached."
            )
        # A token sees itself whatever the window; padding is seen by nobody.
        itself = attention_mask[:, 0].diagonal(offset=past, dim1=-2, dim2=-1)[:, :length]
        seen = itself if itself.dtype == torch.bool else itself == 0
        return seen.expand(batch, -1)
    if attention_mask.shape[1] != past + length:
        return None
    return attention_mask[:, past:].bool()
