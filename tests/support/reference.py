"""An independent recomputation of reduced generation: one prompt at a time, without padding or
cache, over embeddings captured from the unmodified model."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import tokenreduce as tr
from support.tiny_models import Case, head_of


def text_decoder(case: Case) -> Any:
    return operator.attrgetter(case.decoder)(case.model)


def captured_prefill(case: Case) -> dict[str, Any]:
    """The arguments of the decoder in the prefill of the unmodified model's generate, and the
    prompts' ``input_ids``."""
    captured: dict[str, Any] = {}

    def capture(_: Any, __: Any, kwargs: dict[str, Any]) -> None:
        if not captured:
            captured.update(kwargs)

    def capture_embedded(_: Any, args: tuple[Any, ...]) -> None:
        # A decoder that embeds images itself shows the embeddings to its first layer.
        if captured.get("inputs_embeds") is None:
            captured["inputs_embeds"] = args[0]

    decoder = text_decoder(case)
    handle = decoder.register_forward_pre_hook(capture, with_kwargs=True)
    layers = getattr(decoder, "layers", None) or decoder.block
    inner = layers[0].register_forward_pre_hook(capture_embedded)
    with torch.no_grad():
        case.model.generate(**case.batch(), max_new_tokens=1, do_sample=False)
    handle.remove()
    inner.remove()
    return {**captured, "input_ids": case.inputs["input_ids"]}


@dataclass(frozen=True)
class ReducedPrompt:
    """One prompt after reduction.

    ``columns`` are the kept columns of the padded sequence, ``row`` the prompt's place in the batch
    and ``prefill`` the decoder's arguments for the whole batch, unreduced.
    """

    embeds: Tensor
    positions: Tensor
    columns: Tensor
    deepstack: dict[str, Any]
    row: int
    prefill: dict[str, Any]


def reduced_prompts(case: Case, reducer: tr.Reducer) -> list[ReducedPrompt]:
    """Apply the reducer to each item of each prompt by hand."""
    prefill = captured_prefill(case)
    embeds, ids = prefill["inputs_embeds"], case.inputs["input_ids"]
    layers = deepstack_layers(prefill)
    layerwise = prefill.get("deepstack_features") is not None
    real = case.inputs["attention_mask"].bool()
    batch, length = ids.shape
    positions = prefill.get("position_ids")
    if positions is None:
        positions = (real.long().cumsum(1) - 1).clamp(min=0)
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
                        (stacked[0] if layerwise else embeds[prompt])[columns][None],
                        torch.tensor(item.coords),
                        protected=protected,
                    )
                )
                kept = columns[result.positions[0]]
                keep[columns] = False
                keep[kept] = True
                if not layerwise:
                    row[kept] = result.features[0]
                visual[kept] = True
                for layer in stacked:
                    layer[kept] = result.apply(layer[columns][None])[0]
        columns = keep.nonzero().squeeze(1)
        deepstack: dict[str, Any] = {}
        if layerwise:
            deepstack["vision_mask"] = visual[columns][None, :, None]
            deepstack["deepstack_features"] = {
                number: layer[columns][visual[columns]]
                for number, layer in zip(prefill["deepstack_features"], stacked, strict=True)
            }
        elif stacked:
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
                prompt,
                prefill,
            )
        )
    return prompts


def deepstack_layers(prefill: dict[str, Any]) -> list[Tensor]:
    """DeepStack features as ``(B, S, D)``, zero where a column is text."""
    mask, all_rows = prefill.get("visual_pos_masks"), prefill.get("deepstack_visual_embeds")
    if prefill.get("vision_mask") is not None:
        mask, all_rows = prefill["vision_mask"][..., 0], prefill["deepstack_features"].values()
    if mask is None:
        return []
    layers = []
    for rows in all_rows:
        layer = torch.zeros(*mask.shape, rows.shape[-1])
        layer[mask] = rows
        layers.append(layer)
    return layers


def hidden_states(
    case: Case, prompt: ReducedPrompt, embeds: Tensor, positions: Tensor, ids: Sequence[int] = ()
) -> Tensor:
    """The decoder's output over a whole sequence, without a cache.

    ``ids`` are the tokens that ``embeds`` has beyond those of the prompt.
    """
    extra = dict(prompt.deepstack)
    if extra:
        name = "vision_mask" if "vision_mask" in extra else "visual_pos_masks"
        text = extra[name].new_zeros(1, embeds.shape[1] - prompt.embeds.shape[1])
        extra[name] = torch.cat([extra[name], text.reshape(1, -1, *extra[name].shape[2:])], 1)
    arguments = {
        "position_ids": positions,
        "attention_mask": torch.ones(embeds.shape[:2], dtype=torch.long),
        **extra,
    }
    if case.further is not None:
        arguments |= case.further(case.model, prompt.prefill, prompt.row, prompt.columns, list(ids))
    with torch.no_grad():
        out = text_decoder(case)(inputs_embeds=embeds, use_cache=False, **arguments)
    return out.last_hidden_state


@torch.no_grad()
def greedy(case: Case, reducer: tr.Reducer, steps: int) -> tuple[Tensor, Tensor]:
    """Ids ``(B, steps)`` and logits ``(steps, B, V)`` of greedy decoding, recomputed each step."""
    return decoded(case, reduced_prompts(case, reducer), steps)


@torch.no_grad()
def decoded(case: Case, prompts: list[ReducedPrompt], steps: int) -> tuple[Tensor, Tensor]:
    """As :func:`greedy`, of prompts that were reduced already."""
    ids, logits = [], []
    for prompt in prompts:
        row_ids: list[int] = []
        row_logits = []
        for _ in range(steps):
            step = next_logits(case, prompt, row_ids)
            row_ids.append(int(step.argmax()))
            row_logits.append(step)
        ids.append(row_ids)
        logits.append(torch.stack(row_logits))
    return torch.tensor(ids), torch.stack(logits, dim=1)


@torch.no_grad()
def beams(case: Case, reducer: tr.Reducer, steps: int, *, width: int) -> Tensor:
    """Ids ``(B, steps)`` of beam search without an end token, recomputed each step."""
    best = []
    for prompt in reduced_prompts(case, reducer):
        hypotheses: list[tuple[float, list[int]]] = [(0.0, [])]
        for _ in range(steps):
            longer = []
            for score, ids in hypotheses:
                scores = next_logits(case, prompt, ids).log_softmax(-1)
                for value, token in zip(*scores.topk(width), strict=True):
                    longer.append((score + float(value), [*ids, int(token)]))
            hypotheses = sorted(longer, reverse=True)[:width]
        best.append(hypotheses[0][1])
    return torch.tensor(best)


def next_logits(case: Case, prompt: ReducedPrompt, ids: list[int]) -> Tensor:
    """Logits ``(V,)`` after a prompt and what was generated since."""
    if case.seq2seq is not None:
        start = case.model.generation_config.decoder_start_token_id
        return seq2seq_logits(case, prompt, [start, *ids])[-1]
    embed = case.model.get_input_embeddings()
    embeds, positions = prompt.embeds, prompt.positions
    for token in ids:
        embeds = torch.cat([embeds, embed(torch.tensor([[token]]))], dim=1)
        positions = torch.cat([positions, positions[..., -1:] + 1], dim=-1)
    return logits_of(case, hidden_states(case, prompt, embeds, positions, ids)[:, -1])[0]


def seq2seq_logits(case: Case, prompt: ReducedPrompt, decoder_ids: list[int]) -> Tensor:
    """Logits ``(T, V)`` of an encoder-decoder, with every token left in its place: those that went
    are masked out instead, so positions need no care."""
    assert case.seq2seq is not None
    embeds = prompt.prefill["inputs_embeds"][prompt.row][None].clone()
    mask = torch.zeros(embeds.shape[:2], dtype=torch.long)
    embeds[:, prompt.columns] = prompt.embeds
    mask[:, prompt.columns] = 1
    encoded = text_decoder(case)(inputs_embeds=embeds, attention_mask=mask)
    predict = operator.attrgetter(case.seq2seq)(case.model) if case.seq2seq else case.model
    out = predict(
        encoder_outputs=encoded,
        attention_mask=mask,
        decoder_input_ids=torch.tensor([decoder_ids]),
        use_cache=False,
    )
    logits: Tensor = out.logits[0]
    return logits


def logits_of(case: Case, hidden: Tensor) -> Tensor:
    """What the model predicts from hidden states."""
    logits: Tensor = head_of(case.model)(hidden)
    return logits if case.after_head is None else case.after_head(case.model.config, logits)
