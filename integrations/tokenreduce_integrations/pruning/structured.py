"""Structured pruning of known encoders: whole blocks, whole heads, whole MLP channels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tokenreduce.errors import PipelineError, UnsupportedModel
from tokenreduce_integrations.pruning import options as option
from tokenreduce_integrations.pruning.encoders import Encoder, Part, find_encoder
from tokenreduce_integrations.pruning.importance import (
    Importance,
    by_calibration,
    by_magnitude,
    unknown,
)
from tokenreduce_integrations.pruning.planning import last_read, make_plan

_SHARES = ("mlp_ratio", "head_ratio", "depth_ratio")
_SCOPES = ("block", "encoder")


class StructuredPruner:
    """CLIP, SigLIP, InternViT, the towers of Qwen-VL, and timm's ViTs.

    Options:
        mlp_ratio: share of the MLP channels to remove.
        head_ratio: share of the attention heads to remove.
        depth_ratio: share of the blocks to remove, rounded to whole blocks.
        scope: ``block`` removes the share from every block; ``encoder`` ranks the channels, and the
            heads, of all blocks together, each by its score over the mean score of its block, so
            that blocks end up with different widths.
        calibration: a folder with pictures to judge importance by; without it, weights are judged.
        multiple_of: MLP widths become multiples of it, which kernels for whole numbers need.
    """

    known = (*_SHARES, "scope", "calibration", "multiple_of")

    def check(self, model: nn.Module, options: Mapping[str, Any]) -> None:
        """See :class:`tokenreduce.backends.EncoderPruner`."""
        option.refuse_unknown(options, self.known)
        shares = {name: option.share(options, name) for name in _SHARES}
        if not any(shares.values()):
            raise PipelineError(
                f"{option.WHERE}: nothing to remove. Give mlp_ratio, head_ratio or depth_ratio."
            )
        option.choice(options, "scope", _SCOPES)
        option.whole(options, "multiple_of", 8)
        if options.get("calibration") is not None:
            option.text(options, "calibration")
        encoder = find_encoder(model)
        if shares["head_ratio"]:
            _require(encoder, "attention", "heads")
        if shares["mlp_ratio"]:
            _require(encoder, "mlp", "MLP channels")

    def prune(self, model: nn.Module, options: Mapping[str, Any], processor: Any) -> None:
        """See :class:`tokenreduce.backends.EncoderPruner`."""
        self.check(model, options)
        encoder = find_encoder(model)
        folder = options.get("calibration")
        if next(encoder.module.parameters()).is_meta:
            if options.get("scope") == "encoder":
                raise UnsupportedModel(
                    f"{option.WHERE}.scope: 'encoder' gives every block the width that its weights "
                    "earn, which is not known without them. Load the model, or count with "
                    "scope 'block'."
                )
            importance = unknown(encoder)
        elif folder is None:
            importance = by_magnitude(encoder)
        else:
            importance = by_calibration(model, encoder, Path(folder), processor)
        kept_blocks = _kept_blocks(model, encoder, importance, option.share(options, "depth_ratio"))
        mlps = [encoder.blocks[i].mlp for i in kept_blocks]
        heads = [encoder.blocks[i].attention for i in kept_blocks]
        scope = option.choice(options, "scope", _SCOPES)
        multiple = option.whole(options, "multiple_of", 8)
        kept: dict[str, Sequence[int]] = {}
        if removed := option.share(options, "mlp_ratio"):
            kept |= _kept_groups(_present(mlps), importance, removed, scope, multiple)
        if removed := option.share(options, "head_ratio"):
            kept |= _kept_groups(_present(heads), importance, removed, scope, 1)
        plan = make_plan(
            model,
            encoder,
            kept_blocks=kept_blocks,
            kept_groups=kept,
            record={"backend": "structured", **options},
        )
        plan.apply(model)


def _require(encoder: Encoder, part: str, what: str) -> None:
    for index, block in enumerate(encoder.blocks):
        if getattr(block, part) is None:
            held = type(block.module).__name__
            raise UnsupportedModel(
                f"{what} of {encoder.path} cannot be pruned: block {index} ({held}) is of a form "
                "that is not known. Its blocks can be (depth_ratio), and the backend "
                "torch_pruning may find its MLP channels."
            )


def _kept_blocks(
    model: Any, encoder: Encoder, importance: Importance, removed: Fraction
) -> list[int]:
    """Blocks that the projector never reads go first, then those of least importance.

    Blocks whose output the LLM is given on the side (DeepStack) stay.
    """
    count = len(encoder.blocks)
    leave = min(count - 1, _rounded(count * removed))
    held = set(getattr(encoder.module, "deepstack_visual_indexes", ()))
    read = last_read(model, encoder)
    free = [i for i in range(count) if i not in held]
    if leave > len(free) - (0 if held else 1):
        raise PipelineError(
            f"{option.WHERE}.depth_ratio: {leave} of {count} blocks cannot leave: {len(held)} of "
            "them are read by the LLM on the side."
        )
    order = sorted(free, key=lambda i: (i <= read, float(importance.blocks[i]), i))
    gone = set(order[:leave])
    return [i for i in range(count) if i not in gone]


def _kept_groups(
    parts: Sequence[Part], importance: Importance, removed: Fraction, scope: str, multiple: int
) -> dict[str, Sequence[int]]:
    scores = [importance.groups(part) for part in parts]
    if scope == "block":
        counts = [_rounded(part.groups * (1 - removed)) for part in parts]
    else:
        relative = [score / score.mean().clamp(min=torch.finfo().tiny) for score in scores]
        together = torch.cat(relative)
        stays = _rounded(len(together) * (1 - removed))
        ranks = together.argsort(descending=True, stable=True).argsort()
        chosen = (ranks < stays).split([part.groups for part in parts])
        counts = [int(part.sum()) for part in chosen]
    return {
        part.path: _best(score, _to_multiple(count, multiple, part.groups))
        for part, score, count in zip(parts, scores, counts, strict=True)
    }


def _best(scores: Tensor, count: int) -> list[int]:
    best = scores.argsort(descending=True, stable=True)[:count]
    kept: list[int] = best.sort().values.tolist()
    return kept


def _to_multiple(count: int, multiple: int, most: int) -> int:
    """The nearest multiple, at least one of them, and never more than there are."""
    return min(most, max(1, _rounded(Fraction(count, multiple))) * multiple)


def _rounded(exact: Fraction) -> int:
    """Half up."""
    return (2 * exact.numerator + exact.denominator) // (2 * exact.denominator)


def _present(parts: Sequence[Part | None]) -> list[Part]:
    return [part for part in parts if part is not None]
