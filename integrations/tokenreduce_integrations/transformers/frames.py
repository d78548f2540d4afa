"""Choosing frames before the encoder.

A stage at the site ``frames`` sees each clip as one visual item whose tokens are its frames. Only
the frames that it chooses are encoded. Their features are written back to their places in an output
of the full shape, zeros standing for the others, so that the model's own reshaping and counting
hold; the tokens of the others are dropped where the LLM reads, by the gather that serves every
site. Positions stay those of the full clip, so the LLM still sees when each frame was.

A frame is described by its pixels: averaged over a grid of 8 x 8 cells, channel by channel, in
float32. Where a model packs several frames into one patch (Qwen-VL packs two), those are chosen
together, as one frame.

Text around a frame is text and stays: Qwen3-VL's timestamps tell of the frames that were dropped,
too. So do newlines at the end of a clip. What a strategy protects within a frame goes with it.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from tokenreduce.errors import BudgetError, MissingSignal, UnsupportedSite
from tokenreduce.packing import PackedTokens
from tokenreduce.reduction import Reduction
from tokenreduce.stage import ItemOutcome, Stage, run_stages, unchanged_outcomes
from tokenreduce.tokens import Layout, VisualTokens

#: Cells along each side of the grid that describes a frame.
DESCRIPTOR_SIDE = 8

Arguments = dict[str, Any]


class ClipFormat(Protocol):
    """How a family's encoder takes clips, and gives their features."""

    @property
    def newlines(self) -> int:
        """Tokens at the end of each clip that belong to no frame."""
        ...

    def describe(self, owner: Any, arguments: Mapping[str, Any]) -> list[Tensor]:
        """The descriptor ``(T, D)`` of each clip's frames."""
        ...

    def choose(self, arguments: Mapping[str, Any], kept: Sequence[Tensor]) -> Arguments:
        """The arguments of the encoding call for the frames at ``kept`` ``(K,)`` of each clip."""
        ...

    def restore(self, output: Any, frames: Sequence[int], kept: Sequence[Tensor]) -> None:
        """Write the features back to their places among all ``frames`` of each clip."""
        ...


@dataclass(frozen=True)
class StackedClips:
    """Clips of equal length in ``pixel_values_videos`` ``(B, T, C, H, W)``, encoded frame by frame.

    The chosen frames are encoded as one clip, since clips may keep different numbers of them.

    Args:
        newlines: tokens that the model appends to each clip.
    """

    newlines: int = 0

    def describe(self, owner: Any, arguments: Mapping[str, Any]) -> list[Tensor]:
        pixels: Tensor = arguments["pixel_values_videos"]
        cells = _describe(pixels.flatten(0, 1))
        return list(cells.unflatten(0, pixels.shape[:2]))

    def choose(self, arguments: Mapping[str, Any], kept: Sequence[Tensor]) -> Arguments:
        pixels: Tensor = arguments["pixel_values_videos"]
        chosen = torch.cat([clip[index] for clip, index in zip(pixels, kept, strict=True)])
        return {"pixel_values_videos": chosen[None]}

    def restore(self, output: Any, frames: Sequence[int], kept: Sequence[Tensor]) -> None:
        pooled: Tensor = output.pooler_output
        rows = pooled.reshape(-1, pooled.shape[-1])
        chosen, end = rows[: len(rows) - self.newlines], rows[len(rows) - self.newlines :]
        features = _scatter(chosen, frames, kept).unflatten(0, (len(frames), -1))
        output.pooler_output = torch.cat([features, end.expand(len(frames), -1, -1)], dim=1)


@dataclass(frozen=True)
class PatchedClips:
    """Clips as flat patches with ``video_grid_thw`` beside them (Qwen-VL).

    The unit of choice is the temporal patch. DeepStack features are written back, too.
    """

    newlines: int = 0

    def describe(self, owner: Any, arguments: Mapping[str, Any]) -> list[Tensor]:
        vision = owner.config.vision_config
        merge = vision.spatial_merge_size
        described = []
        for (t, h, w), patches in _patched(arguments):
            means = patches.float().unflatten(1, (vision.in_channels, -1)).mean(2)
            # Patches come in blocks of those that are merged into one token.
            cells = means.reshape(t, h // merge, w // merge, merge**2, -1).mean(3)
            described.append(_describe(cells.permute(0, 3, 1, 2)))
        return described

    def choose(self, arguments: Mapping[str, Any], kept: Sequence[Tensor]) -> Arguments:
        grids = arguments["video_grid_thw"].clone()
        chosen = []
        for clip, ((t, _, _), patches) in enumerate(_patched(arguments)):
            chosen.append(patches.unflatten(0, (t, -1))[kept[clip]].flatten(0, 1))
            grids[clip, 0] = len(kept[clip])
        return {"pixel_values_videos": torch.cat(chosen), "video_grid_thw": grids}

    def restore(self, output: Any, frames: Sequence[int], kept: Sequence[Tensor]) -> None:
        def whole(clips: Sequence[Tensor]) -> tuple[Tensor, ...]:
            parts = zip(clips, frames, kept, strict=True)
            return tuple(_scatter(clip, [t], [index]) for clip, t, index in parts)

        output.pooler_output = whole(output.pooler_output)
        if getattr(output, "deepstack_features", None) is not None:
            output.deepstack_features = [whole(layer) for layer in output.deepstack_features]


@dataclass(frozen=True)
class _Choice:
    """What the stages made of the items of one encoding call, in frames.

    ``outcomes`` is None for items that have no frames.
    """

    stages: tuple[Stage, ...]
    frames: tuple[int, ...] = ()
    outcomes: tuple[ItemOutcome, ...] | None = None

    @property
    def kept(self) -> list[Tensor]:
        """The chosen frames of each clip."""
        return [
            torch.arange(frames) if outcome.reduction is None else outcome.reduction.positions[0]
            for frames, outcome in zip(self.frames, self.outcomes or (), strict=True)
        ]


class _Latest(threading.local):
    """The latest encoding call; threads may share a model."""

    def __init__(self) -> None:
        self.choice: _Choice | None = None


class FramesSite:
    """See :class:`tokenreduce_integrations.transformers.watch.EncoderSite`.

    Args:
        format: how the family's encoder takes clips.
        owner: the module that encodes.
        stages: gives the stages at this site that act now.

    Raises:
        UnsupportedSite: if a strategy merges.
        MissingSignal: if a strategy reads signals of the encoder.
        BudgetError: if a budget is shared among the items of a prompt.
    """

    def __init__(
        self, format: ClipFormat, owner: Any, stages: Callable[[], tuple[Stage, ...]]
    ) -> None:
        self._format = format
        self._owner = owner
        self._stages = stages
        self._latest = _Latest()
        _check(stages())

    def encode(
        self, modality: str, call: Callable[..., Any], arguments: inspect.BoundArguments
    ) -> Any:
        """Encode the chosen frames only."""
        self._latest.choice = None
        stages = self._stages()
        if not stages:
            return call(**_keywords(arguments))
        if modality != "video":
            self._latest.choice = _Choice(stages)
            return call(**_keywords(arguments))
        _check(stages)
        choice = self._choose(stages, arguments.arguments)
        if all(outcome.reduction is None for outcome in choice.outcomes or ()):
            output = call(**_keywords(arguments))
        else:
            output = self._encode_chosen(choice, call, _keywords(arguments))
        self._latest.choice = choice
        return output

    def outcomes(self, layouts: Sequence[Layout]) -> list[ItemOutcome] | None:
        """What became of each item of the latest encoding call, in tokens."""
        choice, self._latest.choice = self._latest.choice, None
        if choice is None:
            return None
        if choice.outcomes is None:
            return unchanged_outcomes(choice.stages, layouts, "images have no frames")
        return [
            _in_tokens(layout, frames, outcome, self._format.newlines)
            for layout, frames, outcome in zip(layouts, choice.frames, choice.outcomes, strict=True)
        ]

    def detach(self) -> None:
        """Nothing is left on the encoder."""

    @torch.no_grad()
    def _choose(self, stages: tuple[Stage, ...], arguments: Mapping[str, Any]) -> _Choice:
        described = self._format.describe(self._owner, arguments)
        frames = tuple(len(clip) for clip in described)
        packed = PackedTokens(
            features=torch.cat(described),
            layouts=tuple(Layout.from_grid((t, 1, 1)) for t in frames),
        )
        return _Choice(stages, frames, tuple(run_stages(stages, packed, [0] * len(frames))))

    def _encode_chosen(
        self, choice: _Choice, call: Callable[..., Any], arguments: Arguments
    ) -> Any:
        known = ("pixel_values_videos", "video_grid_thw")
        computed = [name for name in arguments if name.startswith("video_") and name not in known]
        if computed:
            raise UnsupportedSite(
                f"{', '.join(computed)} was computed beforehand for all frames of the clips, of "
                "which a stage at the site 'frames' has only some encoded. Leave it to the model."
            )
        output = call(**{**arguments, **self._format.choose(arguments, choice.kept)})
        if getattr(output, "pooler_output", None) is not None:
            self._format.restore(output, choice.frames, choice.kept)
        return output


def _keywords(arguments: inspect.BoundArguments) -> Arguments:
    """The arguments by name: some models take settings by name only, whatever they declare."""
    given = dict(arguments.arguments)
    further = given.pop("kwargs", {})
    return {**given, **further}


def _check(stages: Sequence[Stage]) -> None:
    """Refuse stages that cannot choose frames.

    Raises:
        TokenReduceError: as :class:`FramesSite` says.
    """
    for stage in stages:
        if stage.total is not None:
            raise BudgetError(
                f"total={stage.total} at the site 'frames': before the encoder it is not known "
                "which clips stand in the same prompt. Give keep or keep_ratio, in frames of each "
                "clip."
            )
        if stage.reducer.needs:
            raise MissingSignal(
                f"strategy {stage.reducer.name!r} needs {', '.join(stage.reducer.needs)}, which "
                "the encoder computes only after frames have been chosen. Use one that reads "
                "features only: uniform, random, divprune."
            )
        for reducer in (stage.reducer, *stage.reducer.inner_reducers()):
            if reducer.record.kind == "merge":
                raise UnsupportedSite(
                    f"strategy {reducer.name!r} merges: at the site 'frames' it would merge "
                    "pictures before the encoder. Choose frames with uniform, random or divprune, "
                    "and merge at the projector site."
                )


def _in_tokens(layout: Layout, frames: int, outcome: ItemOutcome, newlines: int) -> ItemOutcome:
    """What choosing frames means for the tokens that the LLM reads."""
    per_frame = (len(layout) - newlines) // frames
    receipts = tuple(
        replace(
            receipt,
            tokens_in=receipt.tokens_in * per_frame + newlines,
            tokens_out=receipt.tokens_out * per_frame + newlines,
            protected=layout.protected_count,
            # What a strategy calls tokens are frames at this site.
            reason=receipt.reason.replace(" tokens,", " frames,"),
        )
        for receipt in outcome.stages
    )
    if outcome.reduction is None:
        return ItemOutcome(reduction=None, stages=receipts)
    chosen = outcome.reduction.positions[0]
    frame = torch.arange(len(layout), device=chosen.device) // per_frame
    keep = torch.isin(frame, chosen) | (frame >= frames)
    # Places alone: the features are those that the LLM reads.
    places = VisualTokens(torch.empty(1, len(layout), 0, device=chosen.device), layout)
    reduction = Reduction.from_kept(places, keep.nonzero().squeeze(1)[None])
    return ItemOutcome(reduction=reduction, stages=receipts)


def _describe(pictures: Tensor) -> Tensor:
    """``(T, C * 64)`` float32 of pictures ``(T, C, H, W)``."""
    return adaptive_avg_pool2d(pictures.float(), DESCRIPTOR_SIDE).flatten(1)


def _patched(arguments: Mapping[str, Any]) -> list[tuple[tuple[int, int, int], Tensor]]:
    """The grid (T, H, W) and patches ``(T * H * W, D)`` of each clip."""
    grids = [(int(t), int(h), int(w)) for t, h, w in arguments["video_grid_thw"].tolist()]
    patches = arguments["pixel_values_videos"].split([t * h * w for t, h, w in grids])
    return list(zip(grids, patches, strict=True))


def _scatter(chosen: Tensor, frames: Sequence[int], kept: Sequence[Tensor]) -> Tensor:
    """Tokens of chosen frames at their places among those of all frames, zeros elsewhere.

    Args:
        chosen: ``(K * n, D)``, of all clips end to end.
        frames: how many frames each clip has; they sum to T.
        kept: the chosen frames of each clip.

    Returns:
        ``(T * n, D)``.
    """
    starts = [sum(frames[:clip]) for clip in range(len(frames))]
    places = torch.cat([index + start for index, start in zip(kept, starts, strict=True)])
    by_frame = chosen.unflatten(0, (len(places), -1))
    whole: Tensor = by_frame.new_zeros(sum(frames), *by_frame.shape[1:])
    whole = whole.index_copy(0, places.to(chosen.device), by_frame)
    return whole.flatten(0, 1)
