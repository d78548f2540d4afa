"""Stages on models whose layers attend across to visual tokens that are not in the sequence
(Llama 3.2 Vision)."""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor, nn

from tokenreduce.errors import AttachmentError, UnsupportedModel
from tokenreduce.tokens import Layout
from tokenreduce_integrations.transformers.attachment import TransformersAttachment
from tokenreduce_integrations.transformers.hooks import outside_compilation
from tokenreduce_integrations.transformers.joint import JointEncoder
from tokenreduce_integrations.transformers.sequence import SequencePlan, gather_outputs
from tokenreduce_integrations.transformers.watch import EncodedItem, Handed, VisualInput

_KEPT = "_tokenreduce_kept"


class _Prompt(threading.local):
    """The tiles of the call under way, and what was kept of them; threads may share a model."""

    def __init__(self) -> None:
        self.tiles: Tensor | None = None
        self.plan: SequencePlan | None = None


class CrossAttentionAttachment(TransformersAttachment):
    """See :class:`tokenreduce.attachment.Attachment`.

    Cross-attention states and the columns of their mask are reduced; the sequence stays as it is.
    The kept columns live on the key-value cache. An item is an image with its tiles; the class
    token of each tile is protected. Where anything goes, the places of tiles that an image does not
    have go too: the unmodified model masks them for all text but that before the first image, which
    it lets attend evenly to everything, and which here attends evenly to what was kept.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._prompt = _Prompt()
        self._handles.append(
            self.owner.register_forward_pre_hook(self._before_owner, with_kwargs=True)
        )

    def _make_watch(self, joint: JointEncoder | None) -> Handed:
        return Handed()

    @outside_compilation
    def _before_owner(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note which tiles are real."""
        pixels, tiles = kwargs.get("pixel_values"), kwargs.get("aspect_ratio_mask")
        if pixels is None:
            self._prompt.tiles = None
        else:
            whole = torch.ones(pixels.shape[:3], dtype=torch.bool, device=pixels.device)
            self._prompt.tiles = whole if tiles is None else tiles.bool()

    @outside_compilation
    def _before_decoder(
        self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        states, cache = kwargs.get("cross_attention_states"), kwargs.get("past_key_values")
        tiles, self._prompt.tiles = self._prompt.tiles, None
        self._prompt.plan = None
        if states is None:
            plan: SequencePlan | None = getattr(cache, _KEPT, None)
            if plan is None:
                return None
            return args, {**kwargs, "cross_attention_mask": _kept_columns(kwargs, plan)}
        if tiles is None:
            raise UnsupportedModel(
                f"{type(self.model).__name__} was given cross_attention_states: pass pixel_values "
                "while a pipeline is attached, which tell the tiles."
            )
        batch = tiles.shape[0]
        states = states.reshape(batch, -1, states.shape[-1])
        real = tiles.flatten(1).repeat_interleave(states.shape[1] // tiles[0].numel(), 1)
        visual = VisualInput({"image": real}, {"image": self._items(tiles, states.shape[1])})
        if self.enabled and self.regions:
            visual = self._with_regions(visual)
        choice = self._choose(visual, {"inputs_embeds": states})
        embeds = kwargs.get("inputs_embeds")
        length = (kwargs["input_ids"] if embeds is None else embeds).shape[1]
        self._record(choice, choice.outcomes, length)
        if not choice.reduces:
            return None
        plan, shorter = gather_outputs(states, real, choice.items)
        self._prompt.plan = plan
        mask = _kept_columns(kwargs, plan)
        if mask is None:
            closed = _closed(plan.valid, shorter.dtype)[:, None, None]
            mask = closed.expand(-1, -1, length, -1)
        return args, {**kwargs, "cross_attention_states": shorter, "cross_attention_mask": mask}

    def _items(self, tiles: Tensor, tokens: int) -> list[EncodedItem]:
        """The images of each prompt: the grids of their real tiles, each after its class token."""
        patches = tokens // tiles[0].numel()
        side = round((patches - 1) ** 0.5)
        items = []
        for count in tiles.sum(-1).flatten().tolist():
            if count == 0:
                continue
            grids = [
                Layout.from_grid((side, side), block=tile).coords for tile in range(int(count))
            ]
            coords = torch.cat([torch.cat([grid[:1], grid]) for grid in grids])
            protected = torch.arange(len(coords)) % patches == 0
            items.append(EncodedItem(Layout(coords, protected), {}))
        return items

    @outside_compilation
    def _after_decoder(self, _: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        plan, self._prompt.plan = self._prompt.plan, None
        cache = getattr(output, "past_key_values", None)
        if plan is not None and cache is not None:
            setattr(cache, _KEPT, plan)
        return None


def _kept_columns(kwargs: dict[str, Any], plan: SequencePlan) -> Tensor | None:
    """The columns of the mask ``(B, 1, S, N)`` that were kept, ``(B, 1, S, M)``; padding closed."""
    mask: Tensor | None = kwargs.get("cross_attention_mask")
    if mask is None:
        return None
    if mask.shape[0] != plan.columns.shape[0]:
        raise AttachmentError(
            f"the cache holds {plan.columns.shape[0]} prompts, the call has {mask.shape[0]}: a "
            "reduced cache of cross-attention cannot change its batch."
        )
    columns = plan.columns[:, None, None].expand(-1, *mask.shape[1:3], -1)
    closed = _closed(plan.valid, mask.dtype)[:, None, None]
    return torch.minimum(mask.gather(-1, columns), closed)


def _closed(valid: Tensor, dtype: torch.dtype) -> Tensor:
    """Zero for tokens, the least number for padding."""
    least = torch.finfo(dtype).min
    return torch.zeros(valid.shape, dtype=dtype, device=valid.device).masked_fill(~valid, least)
