"""What a pipeline would cost, from a model's configuration alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import nn

from tokenreduce.errors import BudgetError, PipelineError, UnsupportedSite
from tokenreduce.pipeline import Pipeline
from tokenreduce.stage import Stage
from tokenreduce.tokens import Layout
from tokenreduce_integrations.accounting.curves import LanguageModelCost, language_model_cost
from tokenreduce_integrations.accounting.encoder import image_cost, tokens_after
from tokenreduce_integrations.accounting.weights import weigh
from tokenreduce_integrations.transformers.loading import load_skeleton


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Costs of one prompt with one image.

    Attributes:
        parameters: numbers of the model as it was trained, as far as they were not pruned.
        visual_tokens: tokens that encoder and projector give, if nothing is cut inside.
        text_tokens: all other tokens of the prompt.
        tokens_per_layer: visual tokens in each layer of the LLM.
        encoder_flops: encoder and projector.
        prefill_flops: the LLM's layers on the whole prompt, and the logits of one token.
        decode_flops: the first token after the prompt.
        kv_bytes: keys and values of the whole prompt; None if their size is not known.
        visual_kv_bytes: those of the visual tokens alone.
    """

    parameters: int
    visual_tokens: int
    text_tokens: int
    tokens_per_layer: tuple[int, ...]
    encoder_flops: int
    prefill_flops: int
    decode_flops: int
    kv_bytes: int | None
    visual_kv_bytes: int | None

    @property
    def layer_average(self) -> float:
        """Visual tokens averaged over the layers of the LLM."""
        return sum(self.tokens_per_layer) / len(self.tokens_per_layer)

    def as_dict(self) -> dict[str, Any]:
        """The estimate as plain data, for JSON."""
        return {**asdict(self), "layer_average": self.layer_average}


def estimate_both(
    pipeline: Pipeline, *, text_tokens: int, visual_tokens: int | None = None
) -> tuple[Estimate, Estimate]:
    """The costs of a prompt to a pipeline and to the unmodified model. No weight is read.

    Args:
        pipeline: with a model.
        text_tokens: tokens of the prompt that are text.
        visual_tokens: tokens of the image, where it is not of the size that the model's
            configuration names.

    Raises:
        PipelineError: if the pipeline names no model.
        TokenReduceError: as for :meth:`tokenreduce.Pipeline.build` and :func:`estimate`.
    """
    settings = pipeline.model
    if settings is None:
        raise PipelineError("this pipeline names no model: add 'model: {path: ...}'.")
    whole = replace(settings, quantization=None, vision_encoder=None)
    mine, base = load_skeleton(settings, pipeline.stages), load_skeleton(whole)
    cost = language_model_cost(base)

    def of(model: nn.Module, stages: Sequence[Stage]) -> Estimate:
        return estimate(
            model, stages, visual_tokens=visual_tokens, text_tokens=text_tokens, cost=cost
        )

    return of(mine, pipeline.stages), of(base, ())


def estimate(
    model: nn.Module,
    stages: Sequence[Stage] = (),
    *,
    text_tokens: int,
    visual_tokens: int | None = None,
    cost: LanguageModelCost | None = None,
    encoder_flops: int | None = None,
) -> Estimate:
    """The cost of a prompt with one image of ``visual_tokens`` tokens.

    Args:
        model: with or without weights; it is not run.
        stages: at any site but ``frames``.
        visual_tokens: tokens that encoder and projector give; those of an image of the size that
            the configuration names if omitted.
        text_tokens: all other tokens of the prompt.
        cost: of the model's LLM, if it is known.
        encoder_flops: FLOPs of encoder and projector, if they are known.

    Raises:
        BudgetError: if a stage decides from the data how many tokens to keep.
        UnsupportedModel: if the model's LLM or its encoder cannot be counted.
        UnsupportedSite: if what a stage spares is known only of what ran.
    """
    cost = cost or language_model_cost(model)
    require_countable(stages)
    inside = [stage for stage in stages if stage.site == "vision"]
    if encoder_flops is None or visual_tokens is None:
        image = image_cost(model, inside)
        visual_tokens = image.tokens if visual_tokens is None else visual_tokens
        encoder_flops = image.flops if encoder_flops is None else encoder_flops
    entered = tokens_after(model, inside, visual_tokens) if inside else visual_tokens
    beyond = [stage for stage in stages if stage.site != "vision"]
    visual = tokens_by_layer(beyond, entered, len(cost.layers))
    whole = [tokens + text_tokens for tokens in visual]
    return Estimate(
        parameters=weigh(model).total_parameters,
        visual_tokens=visual_tokens,
        text_tokens=text_tokens,
        tokens_per_layer=visual,
        encoder_flops=encoder_flops,
        prefill_flops=cost.prefill(whole),
        decode_flops=cost.decode(whole),
        kv_bytes=cost.cache(whole),
        visual_kv_bytes=cost.cache(visual),
    )


def require_countable(stages: Sequence[Stage]) -> None:
    """Check that stages say by themselves how many tokens they keep.

    Raises:
        BudgetError: if one decides from the data, or on a live model.
        UnsupportedSite: if one chooses frames of a clip.
    """
    for stage in stages:
        if stage.site == "frames":
            raise UnsupportedSite(
                f"{stage.reducer.name} at the site 'frames': it chooses among the frames of a "
                "clip, and what is counted here is one image. Measure it on a clip."
            )
        stage.require_budget()
        if stage.limit is not None:
            raise BudgetError(
                f"{stage.limit} is solved for on a live model. Give keep, keep_ratio or reduction, "
                "or measure it."
            )
        if stage.reducer.budget is None and stage.schedule is None and stage.total is None:
            raise BudgetError(
                f"{stage.reducer.name} decides from the data how many tokens to keep: its cost is "
                "known only of what ran. Give it a budget, or measure it."
            )


def tokens_by_layer(stages: Sequence[Stage], tokens: int, layers: int) -> tuple[int, ...]:
    """Visual tokens in each layer of the LLM, of ``tokens`` that enter.

    Args:
        stages: at the sites ``projector`` and ``decoder``.
        tokens: that encoder and projector give.
        layers: of the LLM.

    Raises:
        BudgetError: if a stage decides from the data, or on a live model, how many tokens to keep.
    """
    require_countable(stages)
    for stage in stages:
        if stage.site != "decoder":
            tokens = _kept(stage, tokens, tokens)
    stages = [stage.within(layers) for stage in stages]
    entered = tokens
    counts = []
    for layer in range(layers):
        for stage in stages:
            if stage.site == "decoder" and layer in stage.layers:
                tokens = _kept(stage.at(layer), tokens, entered)
        counts.append(tokens)
    return tuple(counts)


def _kept(stage: Stage, tokens: int, original: int) -> int:
    [reducer] = stage.reducers([Layout.line(tokens)], [0], [original])
    return min(tokens, reducer.count(tokens))
