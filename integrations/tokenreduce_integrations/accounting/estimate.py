"""What a pipeline would cost, from a model's configuration alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from tokenreduce.errors import BudgetError, UnsupportedModel, UnsupportedSite
from tokenreduce.stage import Stage
from tokenreduce.tokens import Layout
from tokenreduce_integrations.accounting.curves import LanguageModelCost, language_model_cost
from tokenreduce_integrations.accounting.flops import count_flops
from tokenreduce_integrations.accounting.parts import find_tower
from tokenreduce_integrations.transformers.families import find_owner


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Costs of one prompt with one image.

    Attributes:
        visual_tokens: tokens that encoder and projector give.
        text_tokens: all other tokens of the prompt.
        tokens_per_layer: visual tokens in each layer of the LLM.
        encoder_flops: encoder and projector.
        prefill_flops: the LLM's layers on the whole prompt, and the logits of one token.
        decode_flops: the first token after the prompt.
        kv_bytes: keys and values of the whole prompt; None if their size is not known.
        visual_kv_bytes: those of the visual tokens alone.
    """

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


def skeleton_of(config: Any) -> nn.Module:
    """A model without weights (meta device) of a transformers configuration."""
    from transformers import AutoModelForImageTextToText

    with torch.device("meta"):
        model: nn.Module = AutoModelForImageTextToText.from_config(config)  # type: ignore[no-untyped-call]
    return model.eval()


def estimate(
    model: nn.Module,
    stages: Sequence[Stage] = (),
    *,
    visual_tokens: int,
    text_tokens: int,
    cost: LanguageModelCost | None = None,
    encoder_flops: int | None = None,
) -> Estimate:
    """The cost of a prompt with one image of ``visual_tokens`` tokens.

    Args:
        model: with or without weights; it is not run.
        stages: at the sites ``projector`` and ``decoder``.
        visual_tokens: tokens that encoder and projector give.
        text_tokens: all other tokens of the prompt.
        cost: of the model's LLM, if it is known.
        encoder_flops: FLOPs of encoder and projector, if they are known.

    Raises:
        BudgetError: if a stage decides from the data how many tokens to keep.
        UnsupportedModel: if the model's LLM cannot be counted.
        UnsupportedSite: if a stage runs before or inside the encoder.
    """
    cost = cost or language_model_cost(model)
    visual = tokens_by_layer(stages, visual_tokens, len(cost.layers))
    whole = [tokens + text_tokens for tokens in visual]
    return Estimate(
        visual_tokens=visual_tokens,
        text_tokens=text_tokens,
        tokens_per_layer=visual,
        encoder_flops=image_flops(model) if encoder_flops is None else encoder_flops,
        prefill_flops=cost.prefill(whole),
        decode_flops=cost.decode(whole),
        kv_bytes=cost.cache(whole),
        visual_kv_bytes=cost.cache(visual),
    )


def tokens_by_layer(stages: Sequence[Stage], tokens: int, layers: int) -> tuple[int, ...]:
    """Visual tokens in each layer of the LLM, of ``tokens`` that enter.

    Raises:
        BudgetError: if a stage decides from the data, or on a live model, how many tokens to keep.
        UnsupportedSite: if a stage runs before or inside the encoder.
    """
    for stage in stages:
        if stage.site in ("frames", "vision"):
            raise UnsupportedSite(
                f"{stage.reducer.name} at the site {stage.site!r}: what it spares the encoder is "
                "known only of what ran. Measure it."
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


def image_flops(model: nn.Module) -> int:
    """FLOPs of encoder and projector for one image of the size that the configuration names.

    Raises:
        UnsupportedModel: if the encoder takes images of any size.
    """
    owner, tower = find_owner(model), find_tower(model)
    config = None if tower is None else tower.config
    size = getattr(config, "image_size", None)
    if size is None:
        raise UnsupportedModel(
            f"{type(model).__name__}: its encoder takes images of any size, so that its "
            "configuration does not say what one costs. Measure it on an image."
        )
    height, width = (size, size) if isinstance(size, int) else size
    bare = model
    if not next(model.parameters()).is_meta:
        bare = skeleton_of(model.config)
        owner = find_owner(bare)
    pixels = torch.empty(1, 3, int(height), int(width), device="meta", dtype=_dtype(bare))
    flops = count_flops(bare, lambda: owner.get_image_features(pixels))
    return flops.total


def _dtype(model: nn.Module) -> torch.dtype:
    return next(model.parameters()).dtype
