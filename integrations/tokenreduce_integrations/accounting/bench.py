"""A pipeline beside the unmodified model: parameters, bytes, FLOPs, tokens, cache and time."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tokenreduce.attachment import Attachment, attach, find_loader
from tokenreduce.errors import PipelineError
from tokenreduce.pipeline import ModelSettings, Pipeline
from tokenreduce.receipt import Receipt
from tokenreduce_integrations.accounting.flops import Flops, count_flops
from tokenreduce_integrations.accounting.timing import Times, median_times, time_answer
from tokenreduce_integrations.accounting.weights import Weights, weigh
from tokenreduce_integrations.transformers.families import find_decoder
from tokenreduce_integrations.transformers.kv_cache import kv_bytes_per_token

#: Makes the inputs of one prompt, given the processor and the model's device.
Prompt = Callable[[Any, torch.device], Mapping[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Side:
    """One of the two that are compared.

    Attributes:
        weights: parameters and bytes.
        flops: of the first token: encoder, selection, prefill.
        tokens_per_layer: visual tokens in each layer of the LLM.
        kv_bytes: keys and values of the visual tokens; None if their size is not known.
        times: by batch size, medians over rounds.
    """

    weights: Weights
    flops: Flops
    tokens_per_layer: tuple[int, ...]
    kv_bytes: int | None
    times: dict[int, Times]

    @property
    def layer_average(self) -> float:
        """Visual tokens averaged over layers."""
        return statistics.fmean(self.tokens_per_layer) if self.tokens_per_layer else 0.0

    def as_dict(self) -> dict[str, Any]:
        """The figures as plain data."""
        return {
            "parameters": {**self.weights.parameters, "total": self.weights.total_parameters},
            "weight_bytes": {**self.weights.bytes, "total": self.weights.total_bytes},
            "flops": {**self.flops.parts, "total": self.flops.total},
            "tokens_per_layer": list(self.tokens_per_layer),
            "layer_average": self.layer_average,
            "kv_bytes": self.kv_bytes,
            "times_ms": {str(batch): times.as_dict() for batch, times in self.times.items()},
        }


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A pipeline and the unmodified model.

    Attributes:
        pipeline: the figures of the pipeline.
        baseline: those of the model without reduction, pruning and quantization.
        speedup: by batch size, the median over rounds of first-token times, baseline over
            pipeline within a round.
        receipt: of the pipeline's prompt.
        attention: the baseline's attention kernel.
        inside: whether a stage acts before or inside the encoder, whose time then counts as what
            is spared, and what choosing there takes as time of the encoder.
    """

    pipeline: Side
    baseline: Side
    speedup: dict[int, float]
    receipt: Receipt
    attention: str
    inside: bool = False

    @property
    def warnings(self) -> list[str]:
        """Where selection costs more time than it saves."""
        found = []
        for batch, mine in self.pipeline.times.items():
            base = self.baseline.times[batch]
            saved = saved_ms(mine, base, inside=self.inside)
            if mine.selection <= saved:
                continue
            spared = "encoder and prefill" if self.inside else "prefill"
            change = f"saves {saved:.2f} ms of {spared}"
            if saved < 0:
                change = f"makes {spared} {-saved:.2f} ms longer"
            text = f"batch {batch}: selection takes {mine.selection:.2f} ms and {change}"
            tokens = break_even(mine, base, inside=self.inside)
            found.append(
                f"{text}; it never pays off."
                if tokens is None
                else f"{text}; it pays off from {tokens} generated tokens on."
            )
        return found

    def as_dict(self) -> dict[str, Any]:
        """The comparison as plain data, for JSON."""
        return {
            "pipeline": self.pipeline.as_dict(),
            "baseline": {**self.baseline.as_dict(), "attention": self.attention},
            "speedup": {str(batch): value for batch, value in self.speedup.items()},
            "warnings": self.warnings,
            "receipt": self.receipt.as_dict(),
        }


def saved_ms(mine: Times, base: Times, *, inside: bool = False) -> float:
    """Milliseconds of prefill, and with ``inside`` of the encoder, that fewer tokens save."""
    encoder = base.encoder - mine.encoder if inside else 0.0
    return base.prefill - mine.prefill + encoder


def break_even(mine: Times, base: Times, *, inside: bool = False) -> int | None:
    """How many tokens have to be generated until selection has paid for itself; None if never.

    The first comes with the prefill, each further one saves the difference of the decode times.
    """
    lost = mine.selection - saved_ms(mine, base, inside=inside)
    if lost <= 0:
        return 1
    gain = base.decode - mine.decode
    return 1 + math.ceil(lost / gain) if gain > 0 else None


def compare(
    pipeline: Pipeline,
    prompt: Prompt,
    *,
    batch_sizes: Sequence[int] = (1,),
    new_tokens: int = 16,
    rounds: int = 5,
) -> Comparison:
    """Measure a pipeline beside the unmodified model under its fastest attention.

    Both are run in turn, round after round, after one round that is not counted. The baseline is
    loaded by itself where the pipeline changes weights or attention.

    Args:
        pipeline: with a model.
        prompt: makes the inputs of one prompt.
        batch_sizes: how many copies of the prompt are answered at once.
        new_tokens: tokens of each answer, at least 2.
        rounds: how many are counted, at least 1.

    Raises:
        PipelineError: if the pipeline names no model, or a number is out of range.
        UncountedOperator: if an operator ran whose FLOPs cannot be counted.
        TokenReduceError: as for :meth:`tokenreduce.Pipeline.build`.
    """
    settings = pipeline.model
    if settings is None:
        raise PipelineError("this pipeline names no model: add 'model: {path: ...}'.")
    if new_tokens < 2 or rounds < 1 or not batch_sizes or min(batch_sizes) < 1:
        raise PipelineError(
            "a benchmark needs batch sizes and rounds of at least 1, and at least 2 new tokens."
        )
    built = pipeline.build()
    model, processor, run = built
    run.detach()
    whole, attention = _baseline(settings, model)
    device = next(model.parameters()).device
    inputs = dict(prompt(processor, device))

    def attached() -> Attachment:
        return attach(model, pipeline, processor=processor)

    times: dict[int, tuple[list[Times], list[Times]]] = {b: ([], []) for b in batch_sizes}
    for number in range(rounds + 1):
        for batch, (mine, base) in times.items():
            copies = repeated(inputs, batch)
            base_run = time_answer(whole, copies, new_tokens)
            with attached() as now:
                my_run = time_answer(model, copies, new_tokens, now)
            if number:
                mine.append(my_run)
                base.append(base_run)
    with attached() as now:
        flops = count_flops(model, lambda: _first_token(model, inputs))
        receipt = now.receipt
    base_flops = count_flops(whole, lambda: _first_token(whole, inputs))
    layers = len(find_decoder(whole).layers)
    entered, held = receipt.tokens_in, kv_bytes_per_token(find_decoder(whole))
    return Comparison(
        pipeline=Side(
            weights=weigh(model),
            flops=flops,
            tokens_per_layer=receipt.tokens_per_layer,
            kv_bytes=receipt.kv_bytes,
            times={b: median_times(mine) for b, (mine, _) in times.items()},
        ),
        baseline=Side(
            weights=weigh(whole),
            flops=base_flops,
            tokens_per_layer=(entered,) * layers,
            kv_bytes=None if held is None else entered * held,
            times={b: median_times(base) for b, (_, base) in times.items()},
        ),
        speedup={
            b: statistics.median(
                theirs.first_token / ours.first_token
                for ours, theirs in zip(mine, base, strict=True)
            )
            for b, (mine, base) in times.items()
        },
        receipt=receipt,
        attention=attention,
        inside=any(stage.site in ("frames", "vision") for stage in pipeline.stages),
    )


def repeated(inputs: Mapping[str, Any], batch: int) -> dict[str, Any]:
    """The inputs of several copies of a prompt: tensors hold prompts, or patches, end to end."""
    return {
        name: torch.cat([value] * batch) if isinstance(value, Tensor) else value
        for name, value in inputs.items()
    }


def fastest_attention(device: torch.device, dtype: torch.dtype) -> str:
    """The attention kernel that the unmodified model is measured with."""
    from transformers.utils.import_utils import is_flash_attn_2_available

    flash = device.type == "cuda" and is_flash_attn_2_available()
    # FlashAttention computes in half precision only.
    return "flash_attention_2" if flash and dtype.itemsize == 2 else "sdpa"


def _baseline(settings: ModelSettings, model: Any) -> tuple[Any, str]:
    attention = fastest_attention(settings.torch_device, model.dtype)
    plain = settings.quantization is None and settings.vision_encoder is None
    stored_plain = getattr(model.config, "quantization_config", None) is None
    if plain and stored_plain and model.config._attn_implementation == attention:
        return model, attention
    whole = replace(settings, quantization=None, vision_encoder=None, attention=attention)
    loaded, _ = find_loader(settings.adapter)(whole, ())
    return loaded, attention


def _first_token(model: Any, inputs: Mapping[str, Any]) -> Any:
    """The prompt alone, with the logits of its last token."""
    return model.generate(**inputs, do_sample=False, num_beams=1, max_new_tokens=1)
