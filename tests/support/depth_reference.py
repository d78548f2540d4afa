"""An independent recomputation of cuts between the layers of the LLM: one prompt at a time, layer
by layer, without padding or cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import tokenreduce as tr
from support import reference
from support.reducers import KeepsAll
from support.tiny_models import Case


@dataclass
class Item:
    """A visual item of one prompt: columns of its sequence, and what the reducer is told."""

    columns: Tensor
    coords: Tensor
    protected: Tensor
    entered: int


def items_of(case: Case, row: int, kept: Tensor) -> list[Item]:
    """The items of a prompt whose kept columns of the padded sequence are given."""
    ids, real = case.inputs["input_ids"][row], case.inputs["attention_mask"][row].bool()
    starts: dict[int, int] = {}
    items = []
    for item in case.items:
        if item.prompt != row:
            continue
        places = ((ids == item.token) & real).nonzero().squeeze(1)
        start = starts.get(item.token, 0)
        starts[item.token] = start + len(item.coords)
        mine = places[start : start + len(item.coords)]
        stays = torch.isin(mine, kept)
        protected = torch.zeros(len(mine), dtype=torch.bool)
        protected[list(item.protected)] = True
        protected = protected[stays]
        items.append(
            Item(
                torch.searchsorted(kept, mine[stays]),
                torch.tensor(item.coords)[stays],
                protected,
                int((~protected).sum()),
            )
        )
    return items


def layers_of(
    case: Case,
    prompt: reference.ReducedPrompt,
    items: list[Item],
    embeds: Tensor,
    positions: Tensor,
    cuts: dict[int, tuple[tr.Reducer, float]],
) -> tuple[Tensor, Tensor]:
    """The decoder's output over a whole sequence, and the columns that it is of.

    ``cuts`` are reducers with the share of the entered tokens that goes on, by layer.
    """
    decoder = reference.text_decoder(case)
    hidden, columns = embeds, torch.arange(embeds.shape[1])
    whole = decoder.rotary_emb(hidden, positions[1:] if len(positions) == 4 else positions)
    stacked = deepstack(prompt, embeds.shape[1])
    now = [item.columns for item in items]
    coords = [item.coords for item in items]
    protected = [item.protected for item in items]
    for index, layer in enumerate(decoder.layers):
        if index in cuts:
            reducer, share = cuts[index]
            stays = torch.ones(len(columns), dtype=torch.bool)
            hidden = hidden.clone()
            kept = []
            for i, item in enumerate(items):
                places = torch.searchsorted(columns, now[i])
                tokens = tr.VisualTokens(hidden[:, places], coords[i], protected=protected[i])
                keep = tr.Budget(keep_ratio=share).count(item.entered) if share else 0
                result = reducer.with_budget(keep=keep)(tokens)
                chosen = result.positions[0]
                stays[places] = False
                stays[places[chosen]] = True
                hidden[:, places[chosen]] = result.features
                stacked = [
                    replaced(rows, places[chosen], result.apply(rows[None, places])[0])
                    for rows in stacked
                ]
                kept.append(chosen)
            now = [n[k] for n, k in zip(now, kept, strict=True)]
            coords = [c[k] for c, k in zip(coords, kept, strict=True)]
            protected = [p[k] for p, k in zip(protected, kept, strict=True)]
            hidden, columns = hidden[:, stays], columns[stays]
            stacked = [rows[stays] for rows in stacked]
        length = len(columns)
        mask = torch.ones(length, length, dtype=torch.bool).tril()[None, None]
        if decoder.config._attn_implementation == "eager":
            mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
        rotary = tuple(part[..., columns, :] for part in whole)
        hidden = layer(hidden, attention_mask=mask, position_embeddings=rotary)
        if index < len(stacked):
            hidden = hidden + stacked[index]
    return decoder.norm(hidden), columns


def deepstack(prompt: reference.ReducedPrompt, length: int) -> list[Tensor]:
    """DeepStack features ``(S, D)``, zero where a column is text."""
    layers = []
    for rows in prompt.deepstack.get("deepstack_visual_embeds", ()):
        mask = prompt.deepstack["visual_pos_masks"][0]
        full = torch.zeros(length, rows.shape[-1])
        full[: len(mask)][mask] = rows
        layers.append(full)
    return layers


def replaced(rows: Tensor, places: Tensor, values: Tensor) -> Tensor:
    rows = rows.clone()
    rows[places] = values
    return rows


@torch.no_grad()
def greedy(
    case: Case,
    cuts: dict[int, tuple[tr.Reducer, float]],
    steps: int,
    before: tr.Reducer | None = None,
) -> tuple[Tensor, Tensor]:
    """Ids ``(B, steps)`` and logits ``(steps, B, V)``, recomputed each step.

    Reducers of ``cuts`` must decide by the visual tokens alone, so that later text changes nothing.
    """
    head = case.model.get_output_embeddings()
    embed: Any = case.model.get_input_embeddings()
    ids, logits = [], []
    for row, prompt in enumerate(reference.reduced_prompts(case, before or KeepsAll())):
        items = items_of(case, row, prompt.columns)
        embeds, positions = prompt.embeds, prompt.positions
        row_ids, row_logits = [], []
        for _ in range(steps):
            hidden, _ = layers_of(case, prompt, items, embeds, positions, cuts)
            step = head(hidden[:, -1])
            token = step.argmax(-1)
            row_ids.append(int(token))
            row_logits.append(step[0])
            embeds = torch.cat([embeds, embed(token)[None]], dim=1)
            positions = torch.cat([positions, positions[..., -1:] + 1], dim=-1)
        ids.append(row_ids)
        logits.append(torch.stack(row_logits))
    return torch.tensor(ids), torch.stack(logits, dim=1)
