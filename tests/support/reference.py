"""An independent recomputation of reduced generation: one prompt at a time, without padding or
cache, over embeddings captured from the unmodified model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import tokenreduce as tr
from support.tiny_models import Case


def text_decoder(model: Any) -> Any:
    return model.model.language_model


def captured_prefill(case: Case) -> dict[str, Any]:
    """The arguments of the decoder in the prefill of the unmodified model's generate."""
    captured: dict[str, Any] = {}

    def capture(_: Any, __: Any, kwargs: dict[str, Any]) -> None:
        if not captured:
            captured.update(kwargs)

    handle = text_decoder(case.model).register_forward_pre_hook(capture, with_kwargs=True)
    with torch.no_grad():
        case.model.generate(**case.batch(), max_new_tokens=1, do_sample=False)
    handle.remove()
    return captured


@dataclass(frozen=True)
class ReducedPrompt:
    """One prompt after reduction.

    ``columns`` are the kept columns of the padded sequence.
    """

    embeds: Tensor
    positions: Tensor
    columns: Tensor
    deepstack: dict[str, Any]


def reduced_prompts(case: Case, reducer: tr.Reducer) -> list[ReducedPrompt]:
    """Apply the reducer to each item of each prompt by hand."""
    prefill = captured_prefill(case)
    embeds, ids = prefill["inputs_embeds"], case.inputs["input_ids"]
    layers = deepstack_layers(prefill)
    real = case.inputs["attention_mask"].bool()
    batch, length = ids.shape
    positions = prefill.get("position_ids")
    if positions is None:
        positions = torch.arange(length)[None]
    positions = positions.expand(*positions.shape[:-2], batch, length)
    prompts = []
    for prompt in range(batch):
        row = embeds[prompt].clone()
        stacked = [layer[prompt].clone() for layer in layers]
        visual = torch.zeros(length, dtype=torch.bool)
        keep = real[prompt].clone()
        for token in {item.token for item in case.items}:
            places = ((ids[prompt] == token) & real[prompt]).nonzero().squeeze(1)
            start = 0
            for item in case.items:
                if item.prompt != prompt or item.token != token:
                    continue
                columns = places[start : start + len(item.coords)]
                start += len(item.coords)
                protected = torch.zeros(len(item.coords), dtype=torch.bool)
                protected[list(item.protected)] = True
                result = reducer(
                    tr.VisualTokens(
                        embeds[prompt, columns][None],
                        torch.tensor(item.coords),
                        protected=protected,
                    )
                )
                kept = columns[result.positions[0]]
                keep[columns] = False
                keep[kept] = True
                row[kept] = result.features[0]
                visual[kept] = True
                for layer in stacked:
                    layer[kept] = result.apply(layer[columns][None])[0]
        columns = keep.nonzero().squeeze(1)
        deepstack: dict[str, Any] = {}
        if stacked:
            deepstack["visual_pos_masks"] = visual[columns][None]
            deepstack["deepstack_visual_embeds"] = [
                layer[columns][visual[columns]] for layer in stacked
            ]
        prompts.append(
            ReducedPrompt(
                row[columns][None],
                positions[..., prompt : prompt + 1, columns],
                columns,
                deepstack,
            )
        )
    return prompts


def deepstack_layers(prefill: dict[str, Any]) -> list[Tensor]:
    """DeepStack features as ``(B, S, D)``, zero where a column is text."""
    mask = prefill.get("visual_pos_masks")
    if mask is None:
        return []
    layers = []
    for rows in prefill["deepstack_visual_embeds"]:
        layer = torch.zeros(*mask.shape, rows.shape[-1])
        layer[mask] = rows
        layers.append(layer)
    return layers


def hidden_states(case: Case, prompt: ReducedPrompt, embeds: Tensor, positions: Tensor) -> Tensor:
    """The decoder's output over a whole sequence, without a cache."""
    extra = dict(prompt.deepstack)
    if extra:
        text = torch.zeros(1, embeds.shape[1] - prompt.embeds.shape[1], dtype=torch.bool)
        extra["visual_pos_masks"] = torch.cat([extra["visual_pos_masks"], text], 1)
    with torch.no_grad():
        out = text_decoder(case.model)(
            inputs_embeds=embeds,
            position_ids=positions,
            attention_mask=torch.ones(embeds.shape[:2], dtype=torch.long),
            use_cache=False,
            **extra,
        )
    return out.last_hidden_state


@torch.no_grad()
def greedy(case: Case, reducer: tr.Reducer, steps: int) -> tuple[Tensor, Tensor]:
    """Ids ``(B, steps)`` and logits ``(steps, B, V)`` of greedy decoding, recomputed each step."""
    return decoded(case, reduced_prompts(case, reducer), steps)


@torch.no_grad()
def decoded(case: Case, prompts: list[ReducedPrompt], steps: int) -> tuple[Tensor, Tensor]:
    """As :func:`greedy`, of prompts that were reduced already."""
    head = case.model.get_output_embeddings()
    embed = case.model.get_input_embeddings()
    ids, logits = [], []
    for prompt in prompts:
        embeds, positions = prompt.embeds, prompt.positions
        row_ids, row_logits = [], []
        for _ in range(steps):
            hidden = hidden_states(case, prompt, embeds, positions)
            step = head(hidden[:, -1])
            token = step.argmax(-1)
            row_ids.append(int(token))
            row_logits.append(step[0])
            embeds = torch.cat([embeds, embed(token)[None]], dim=1)
            positions = torch.cat([positions, positions[..., -1:] + 1], dim=-1)
        ids.append(row_ids)
        logits.append(torch.stack(row_logits))
    return torch.tensor(ids), torch.stack(logits, dim=1)
