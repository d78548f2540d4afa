"""What a vision encoder costs on one image, from its configuration alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tokenreduce.attachment import find_adapter
from tokenreduce.errors import UnsupportedModel, UnsupportedSite
from tokenreduce.stage import Stage
from tokenreduce_integrations.accounting.flops import count_flops
from tokenreduce_integrations.accounting.parts import find_tower
from tokenreduce_integrations.encoders.stack import wrap_method
from tokenreduce_integrations.pruning.encoders import picture_size
from tokenreduce_integrations.pruning.surgery import plan_of
from tokenreduce_integrations.pruning.timm_tower import adapt_timm_tower
from tokenreduce_integrations.transformers.families import find_owner
from tokenreduce_integrations.transformers.hooks import restore_methods
from tokenreduce_integrations.transformers.skeleton import skeleton_of
from tokenreduce_integrations.transformers.vision import PatchTowerSite, TiledTowerSite


@dataclass(frozen=True, kw_only=True)
class ImageCost:
    """One image of the size that the configuration names.

    Attributes:
        flops: of encoder and projector.
        tokens: that they give.
    """

    flops: int
    tokens: int


def image_cost(model: nn.Module, stages: Sequence[Stage] = ()) -> ImageCost:
    """The cost of encoder and projector, without that of choosing tokens.

    Args:
        model: with or without weights; it is not run.
        stages: at the site ``vision``, whose budgets say how many tokens go on after each block.

    Raises:
        UnsupportedModel: if the encoder takes images of any size.
        UnsupportedSite: if what the stages spare is known only of what ran.
    """
    tower = find_tower(model)
    size = None if tower is None else picture_size(tower.config)
    if size is None:
        raise UnsupportedModel(
            f"{type(model).__name__}: its encoder takes images of any size, so that its "
            "configuration does not say what one costs. Measure it on an image."
        )
    bare: Any = model
    if not next(model.parameters()).is_meta:
        bare = skeleton_of(model.config, plan_of(model))
        adapt_timm_tower(bare)
    owner = find_owner(bare)
    pixels = torch.empty(1, 3, *size, device="meta", dtype=next(bare.parameters()).dtype)
    given: list[Any] = []

    def encode() -> None:
        given.append(owner.get_image_features(pixels).pooler_output)

    flops = count_flops(bare, encode).total
    tokens = sum(len(image.flatten(0, -2)) for image in given[0])
    if stages:
        with _shortened(bare, stages, tokens):
            flops = count_flops(bare, encode).total
    return ImageCost(flops=flops, tokens=tokens)


def tokens_after(model: nn.Module, stages: Sequence[Stage], tokens: int) -> int:
    """How many of an image's tokens stages inside the encoder leave.

    Raises:
        UnsupportedSite: if that is known only of what ran.
    """
    with _site(model, stages) as site:
        return site.units(tokens)[-1]


@contextmanager
def _site(model: nn.Module, stages: Sequence[Stage]) -> Iterator[PatchTowerSite]:
    adapter: Any = find_adapter(model)
    owner = adapter.parts(model)["owner"]
    site = adapter.family.encoder_sites["vision"](owner, lambda: tuple(stages))
    try:
        if not isinstance(site, PatchTowerSite) or isinstance(site, TiledTowerSite):
            raise UnsupportedSite(
                f"{stages[0].reducer.name} at the site 'vision': {type(model).__name__} encodes "
                "images of any size or in tiles, so that what it spares the encoder is known only "
                "of what ran. Measure it."
            )
        yield site
    finally:
        site.detach()


@contextmanager
def _shortened(model: nn.Module, stages: Sequence[Stage], tokens: int) -> Iterator[None]:
    """Have each block see as many tokens as go on, and hand on as many as the image has."""
    with _site(model, stages) as site:
        blocks, lengths = site.blocks, [site.sequence(count) for count in site.units(tokens)]

    def around(
        length: int, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if args:
            output = call(args[0][:, :length], *args[1:], **kwargs)
        else:
            output = call(**{**kwargs, "hidden_states": kwargs["hidden_states"][:, :length]})
        states: Tensor = output[0] if isinstance(output, tuple) else output
        whole = states.new_empty(states.shape[0], lengths[0], states.shape[2])
        return (whole, *output[1:]) if isinstance(output, tuple) else whole

    # Not by hooks: transformers' own, which collect hidden states, have to see whole ones.
    replaced = [
        wrap_method(block, "forward", partial(around, length))
        for block, length in zip(blocks, lengths, strict=False)
    ]
    try:
        yield
    finally:
        restore_methods(replaced)
