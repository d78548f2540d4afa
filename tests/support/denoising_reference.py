"""An independent recomputation of answers that are denoised: one prompt at a time, without padding,
and without a cache from one step to the next."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor

import tokenreduce as tr
from support import reference
from support.tiny_families import Tiny, block_masks, positioned_patches
from support.tiny_models import Case

CANVAS, BLOCKS, STEPS = 8, 2, 3
COOL, HOT, BOUND = 0.4, 0.8, 0.1
KEEP_ALL = tr.create_strategy("norm-topk", keep_ratio=1.0)


@functools.cache
def tiny(*, both_ways: bool = False, window: int = 64) -> Tiny:
    """A tiny DiffusionGemma."""
    return Tiny(
        model="DiffusionGemmaForBlockDiffusion",
        visual=positioned_patches(8, 48),
        types="mm_token_type_ids",
        decoder="model.encoder.language_model",
        further=block_masks(of="images", windowed=False, kinds=True) if both_ways else None,
        changes={
            "canvas_length": CANVAS,
            "text_config": {
                "layer_types": ["sliding_attention", "full_attention"] * 2,
                "sliding_window": window,
                "global_head_dim": 16,
                "num_experts": 4,
                "top_k_experts": 2,
                "moe_intermediate_size": 32,
                "use_bidirectional_attention": "vision" if both_ways else None,
            },
            "vision_config": {
                "model_type": "gemma4_vision",
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 4,
                "head_dim": 8,
                "patch_size": 4,
                "pooling_kernel_size": 2,
                "position_embedding_size": 16,
            },
        },
    )


def case(side: str = "left", **kind: Any) -> Case:
    """Two prompts of unequal length for a tiny DiffusionGemma, which never stops early.

    Args:
        side: on which side the shorter is padded.
        kind: as for :func:`tiny`.
    """
    made = tiny(**kind).case(side)
    settings = made.model.generation_config
    settings.max_denoising_steps, settings.confidence_threshold = STEPS, 1e-9
    settings.t_min, settings.t_max = COOL, HOT
    settings.sampler_config = transformers.EntropyBoundSamplerConfig(entropy_bound=BOUND)
    return made


@dataclass(frozen=True)
class Answer:
    """What was generated: ids ``(B, blocks * canvas)``, and the raw logits of each step."""

    ids: Tensor
    logits: list[Tensor]

    def check(self, expected: Answer, tolerance: float) -> None:
        """Check that it is the expected one."""
        assert torch.equal(self.ids, expected.ids)
        assert len(self.logits) == len(expected.logits)
        for mine, other in zip(self.logits, expected.logits, strict=True):
            assert (mine - other).abs().max() <= tolerance


@contextmanager
def recorded_logits(case: Case) -> Iterator[list[Tensor]]:
    """What the head says at each denoising step."""
    seen: list[Tensor] = []
    handle = case.model.lm_head.register_forward_hook(lambda _, __, out: seen.append(out))
    try:
        yield seen
    finally:
        handle.remove()


def generate(case: Case, **options: Any) -> Answer:
    """What ``generate`` answers from a fixed seed."""
    torch.manual_seed(3)
    with recorded_logits(case) as logits:
        sequences = case.model.generate(
            **case.batch(), max_new_tokens=BLOCKS * CANVAS, **options
        ).sequences
    return Answer(sequences[:, -BLOCKS * CANVAS :], logits)


@torch.no_grad()
def denoised(
    case: Case, reducer: tr.Reducer, from_step: int = 0, said: Tensor | None = None
) -> Answer:
    """The same, recomputed.

    Args:
        case: the prompts.
        reducer: what reduces them.
        from_step: the first step of each block that reads the reduced prompts.
        said: ``(B, T)`` ids that follow the prompts.
    """
    whole = reference.reduced_prompts(case, KEEP_ALL)
    reduced = reference.reduced_prompts(case, reducer)
    start, batch = case.inputs["input_ids"].shape[1], len(whole)
    begin = said = torch.zeros(batch, 0, dtype=torch.long) if said is None else said
    vocabulary, logits = case.model.config.text_config.vocab_size, []
    torch.manual_seed(3)
    for _ in range(BLOCKS):
        canvas = torch.randint(vocabulary, (batch, CANVAS))
        belief = None
        caches = {id(p): encoded(case, p, start, said) for p in (*whole, *reduced)}
        for step in range(STEPS):
            prompts = whole if step < from_step else reduced
            place = start + said.shape[1]
            with recorded_logits(case) as rows:
                raw = torch.cat(
                    [read(case, p, caches[id(p)], place, canvas, belief) for p in prompts]
                )
            logits.append(torch.cat(rows))
            belief = raw / (COOL + (HOT - COOL) * (STEPS - step) / STEPS)
            drawn = torch.multinomial(belief.softmax(-1).flatten(0, 1), 1).view(batch, CANVAS)
            entropy = torch.distributions.Categorical(logits=belief).entropy()
            accepted = torch.zeros(batch, CANVAS, dtype=torch.bool)
            for row, values in enumerate(entropy):
                spent = 0.0
                for place in values.argsort():
                    if spent > BOUND:
                        break
                    accepted[row, place] = True
                    spent += float(values[place])
            canvas = torch.where(accepted, drawn, torch.randint(vocabulary, (batch, CANVAS)))
        said = torch.cat([said, belief.argmax(-1)], 1)
    return Answer(said[:, begin.shape[1] :], logits)


@torch.no_grad()
def encoded(case: Case, prompt: reference.ReducedPrompt, start: int, said: Tensor) -> Any:
    """The cache of one prompt with what was said since, read afresh.

    Args:
        case: the case.
        prompt: the prompt.
        start: the position at which the answer begins.
        said: ``(B, T)`` ids of finished blocks.
    """
    encoder = reference.text_decoder(case)
    own, length = said[prompt.row][None], said.shape[1]
    embeds = torch.cat([prompt.embeds, encoder.embed_tokens(own)], 1)
    positions = torch.cat([prompt.positions, torch.arange(start, start + length)[None]], 1)
    extra = {"attention_mask": torch.ones(embeds.shape[:2], dtype=torch.long)}
    if case.further is not None:
        extra |= case.further(
            case.model, prompt.prefill, prompt.row, prompt.columns, own[0].tolist()
        )
    return encoder(inputs_embeds=embeds, position_ids=positions, **extra).past_key_values


@torch.no_grad()
def read(
    case: Case,
    prompt: reference.ReducedPrompt,
    cache: Any,
    place: int,
    canvas: Tensor,
    belief: Tensor | None,
) -> Tensor:
    """``(1, C, V)`` logits of one step of one prompt.

    Args:
        case: the case.
        prompt: the prompt.
        cache: what was read before.
        place: the position at which the block begins.
        canvas: ``(B, C)`` ids of the block under way.
        belief: ``(B, C, V)`` what the step before said; None in the first one.
    """
    logits: Tensor = case.model(
        decoder_input_ids=canvas[prompt.row][None],
        past_key_values=cache,
        self_conditioning_logits=None if belief is None else belief[prompt.row][None],
        decoder_position_ids=torch.arange(place, place + CANVAS)[None],
    ).logits
    return logits
