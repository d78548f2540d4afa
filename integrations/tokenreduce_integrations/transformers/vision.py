"""Stages inside the vision towers of multimodal models.

The tower's output keeps its shape, so that the model's reshaping, packing and counting hold; what
was merged or dropped is carried as a reduction to where the LLM reads, and applied there once.
"""

from __future__ import annotations

import inspect
import math
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tokenreduce.errors import StageNotEngaged, UnsupportedSite
from tokenreduce.reduction import Reduction
from tokenreduce.stage import ItemOutcome, Stage
from tokenreduce.tokens import Layout
from tokenreduce_integrations.encoders.carry import ADDED, carried, item_outcome
from tokenreduce_integrations.encoders.dense import DenseWalk, Sequences, Trail
from tokenreduce_integrations.encoders.kinds import takes_bias
from tokenreduce_integrations.encoders.packed import BIAS, PackedWalk
from tokenreduce_integrations.encoders.plan import check_stages, plan_cuts, why_kept
from tokenreduce_integrations.encoders.stack import BlockStack, wrap_method
from tokenreduce_integrations.transformers.hooks import Uncopyable, restore_methods
from tokenreduce_integrations.transformers.layouts import grid_layout
from tokenreduce_integrations.transformers.tiles import packing_settings, tile_counts

Given = Mapping[str, Any]


class _Latest(threading.local):
    """The latest encoding of this thread."""

    walk: Any = None
    given: Given | None = None


def prefix_tokens(tower: Any) -> int:
    """Class and register tokens that come before the patches."""
    if (inner := getattr(tower, "timm_model", None)) is not None:
        return int(inner.num_prefix_tokens)
    embeddings = tower.embeddings
    classes = any(hasattr(embeddings, name) for name in ("class_embedding", "cls_token"))
    return int(classes) + int(getattr(tower.config, "num_register_tokens", 0))


def patch_grid(tower: Any, pixels: Tensor, patches: int) -> Layout:
    """Where the patches of an image lie: a grid, if the tower cuts it into one."""
    inner = getattr(tower, "timm_model", None)
    size = tower.config.patch_size if inner is None else inner.patch_embed.patch_size
    sides = size if isinstance(size, list | tuple) else (size, size)
    grid = [extent // side for extent, side in zip(pixels.shape[-2:], sides, strict=True)]
    return grid_layout(grid, patches)


class _TowerSite(Uncopyable, ABC):
    """Stages inside the blocks of a tower; see :class:`watch.EncoderSite`."""

    #: Attribute of the owner that holds the tower.
    tower_name: ClassVar[str] = "vision_tower"

    def __init__(self, owner: Any, stages: Callable[[], tuple[Stage, ...]]) -> None:
        self._owner = owner
        self._tower: Any = getattr(owner, self.tower_name)
        self._stages = stages
        self._latest = _Latest()
        now = stages()
        self._stack: BlockStack[Any] = BlockStack(self._tower, now, self._prefix)
        try:
            self._check(now, {})
        except Exception:
            self._stack.detach()
            raise

    def encode(
        self, modality: str, call: Callable[..., Any], arguments: inspect.BoundArguments
    ) -> Any:
        """See :class:`watch.EncoderSite`."""
        self._latest.walk = self._latest.given = None
        stages = self._stages()
        # By name: transformers adds defaults by name, also of what was given by place.
        given = dict(arguments.arguments)
        given.update(given.pop("kwargs", {}))
        if not stages:
            return call(**given)
        self._check(stages, given)
        walk = self._walk(modality, stages, given)
        with self._stack.walking(walk):
            output = call(**given)
        self._latest.walk, self._latest.given = walk, given
        return output

    def outcomes(self, layouts: Sequence[Layout]) -> list[ItemOutcome] | None:
        """See :class:`watch.EncoderSite`."""
        walk, given = self._latest.walk, self._latest.given
        self._latest.walk = self._latest.given = None
        if walk is None or given is None:
            return None
        return self._outcomes(walk, given, layouts)

    def detach(self) -> None:
        """See :class:`watch.EncoderSite`."""
        self._stack.detach()

    @property
    def _prefix(self) -> int:
        return prefix_tokens(self._tower)

    def _depth(self, given: Given) -> int:
        """Blocks that the features for the LLM depend on."""
        return min(self._feature_depths(given))

    def _feature_depths(self, given: Given) -> list[int]:
        """After how many blocks the features are taken; several where they are concatenated."""
        count = len(self._stack.blocks)
        chosen = given.get("vision_feature_layer")
        if chosen is None:
            chosen = self._owner.config.vision_feature_layer
        layers = [chosen] if isinstance(chosen, int) else list(chosen)
        return [layer if layer >= 0 else count + 1 + layer for layer in layers]

    def _check(self, stages: Sequence[Stage], given: Given) -> None:
        check_stages(stages, self._depth(given), type(self._tower).__name__)

    def _exposed(self, given: Given) -> frozenset[int]:
        """Blocks whose outputs are read outside the tower."""
        count = len(self._stack.blocks)
        if hasattr(self._tower, "timm_model"):
            # timm makes a map of every block's output, read or not.
            return frozenset(range(count))
        asked = given.get("output_hidden_states")
        if asked is None:
            asked = getattr(self._tower.config, "output_hidden_states", False)
        if asked:
            return frozenset(range(count))
        return frozenset({count - 1, *(depth - 1 for depth in self._feature_depths(given))})

    @abstractmethod
    def _walk(self, modality: str, stages: tuple[Stage, ...], given: Given) -> Any:
        """The state of an encoding."""

    @abstractmethod
    def _outcomes(
        self, walk: Any, given: Given, layouts: Sequence[Layout]
    ) -> list[ItemOutcome]: ...


class PatchTowerSite(_TowerSite):
    """A tower whose patches reach the LLM one by one: LLaVA with CLIP, SigLIP or DINOv2."""

    @property
    def _unit(self) -> int:
        """Patches that become one token of the LLM."""
        return 1

    @property
    def blocks(self) -> list[nn.Module]:
        """The tower's blocks, in order."""
        return self._stack.blocks

    def units(self, tokens: int) -> list[int]:
        """How many of an image's ``tokens`` tokens enter each block, and leave the last."""
        stages, counts = self._stages(), [tokens]
        cuts = plan_cuts(stages, self._depth({}), (tokens,), (0,))
        for block in range(1, len(self.blocks) + 1):
            left = counts[-1]
            for cut in cuts.get(block, ()):
                left = min(left, cut.reducers[0].count(left))
            counts.append(left)
        return counts

    def sequence(self, tokens: int) -> int:
        """Length of the sequence that holds so many of an image's tokens."""
        return self._prefix + tokens * self._unit

    def _walk(self, modality: str, stages: tuple[Stage, ...], given: Given) -> DenseWalk:
        return DenseWalk(
            stages,
            self._depth(given),
            self._exposed(given),
            partial(self._describe, modality, given),
            self._stack.signals,
        )

    def _describe(self, modality: str, given: Given, batch: int, length: int) -> Sequences:
        layout = patch_grid(self._tower, given["pixel_values"], length - self._prefix)
        return Sequences(layouts=(layout,) * batch, owners=tuple(range(batch)), prefix=self._prefix)

    def _sources(
        self, walk: DenseWalk, given: Given, layouts: Sequence[Layout]
    ) -> list[tuple[range, Tensor]]:
        """For each item, its sequences and the patch (counted over them) of each token."""
        return [
            (range(row, row + 1), self._selected(len(layout), walk))
            for row, layout in enumerate(layouts)
        ]

    def _selected(self, count: int, walk: DenseWalk) -> Tensor:
        """The patch of each of ``count`` features of a sequence; those before are not patches."""
        patches = len(walk.sequences.layouts[0])
        source = torch.arange(count) + patches - count
        return source.clamp(min=ADDED)

    def _outcomes(
        self, walk: DenseWalk, given: Given, layouts: Sequence[Layout]
    ) -> list[ItemOutcome]:
        outcomes = []
        lengths = [len(layout) for layout in walk.sequences.layouts]
        for layout, (rows, source) in zip(
            layouts, self._sources(walk, given, layouts), strict=True
        ):
            steps: list[Reduction | None] = []
            reasons: list[str] = []
            for index, stage in enumerate(walk.stages):
                trail = walk.trails.get(index)
                if trail is None:
                    tokens = sum(lengths[row] for row in rows)
                    steps.append(None)
                    reasons.append(why_kept(stage, self._depth(given), tokens))
                    continue
                mine = slice(rows.start, rows.stop)
                steps.append(carried(*_end_to_end(trail, mine), source.to(trail.positions.device)))
                why = trail.reasons[mine]
                reasons.append("; ".join(dict.fromkeys(why)) if all(why) else "")
            outcomes.append(item_outcome(walk.stages, layout, steps, reasons))
        return outcomes


class TiledTowerSite(PatchTowerSite):
    """Images cut into tiles, which the model puts together again: LLaVA-NeXT, LLaVA-OneVision.

    The model's own packing is asked where each token comes from. Newlines stay.
    """

    def _walk(self, modality: str, stages: tuple[Stage, ...], given: Given) -> DenseWalk:
        if modality == "video":
            raise UnsupportedSite(
                f"a clip given to {type(self._owner).__name__} with a stage at the site 'vision': "
                "its frames are pooled bilinearly after the encoder, so that no token of the LLM "
                "stands for one token of the encoder. Use the projector site for clips."
            )
        return super()._walk(modality, stages, given)

    def _describe(self, modality: str, given: Given, batch: int, length: int) -> Sequences:
        whole = super()._describe(modality, given, batch, length)
        owners = [
            i for i, tiles in enumerate(tile_counts(self._owner, given)) for _ in range(tiles)
        ]
        return Sequences(layouts=whole.layouts, owners=tuple(owners), prefix=whole.prefix)

    def _sources(
        self, walk: DenseWalk, given: Given, layouts: Sequence[Layout]
    ) -> list[tuple[range, Tensor]]:
        owner, sequences = self._owner, walk.sequences
        patches = len(sequences.layouts[0])
        settings = packing_settings(owner, given)
        strategy = given.get("vision_feature_select_strategy")
        strategy = strategy or owner.config.vision_feature_select_strategy
        count = patches + sequences.prefix - (strategy == "default")
        selected = self._selected(count, walk)
        marked, rows, start = [], [], 0
        for tiles in tile_counts(owner, given):
            # One above the patch; 0 marks what is none. The square tells a patch from a mean.
            mark = (selected + 1 + torch.arange(tiles)[:, None] * patches) * (selected >= 0)
            marked.append(torch.stack([mark, mark**2], dim=-1).double())
            rows.append(range(start, start + tiles))
            start += tiles
        packed, _ = owner.pack_image_features(
            marked, given["image_sizes"], image_newline=torch.zeros(2).double(), **settings
        )
        for item in packed:
            if not torch.equal(item[:, 0] ** 2, item[:, 1]):
                raise UnsupportedSite(
                    f"{type(owner).__name__} resizes this image's features after the encoder (it "
                    "has more tiles than vision_aspect_ratio allows), so that no token of the LLM "
                    "stands for one token of the encoder. Use the projector site for it."
                )
        return [(r, item[:, 0].long() - 1) for r, item in zip(rows, packed, strict=True)]


class ShuffledTowerSite(PatchTowerSite):
    """Patches that a pixel shuffle packs: InternVL. A packed square merges as a whole."""

    @property
    def _unit(self) -> int:
        return self._side**2

    @property
    def _side(self) -> int:
        ratio: float = self._owner.config.downsample_ratio
        return round(1 / ratio)

    def _describe(self, modality: str, given: Given, batch: int, length: int) -> Sequences:
        side, block = math.isqrt(length - self._prefix), self._side
        grid = torch.arange(side * side).reshape(side // block, block, side // block, block)
        layout = Layout.from_grid((side // block, side // block))
        return Sequences(
            layouts=(layout,) * batch,
            owners=tuple(range(batch)),
            prefix=self._prefix,
            unit=self._unit,
            order=grid.transpose(1, 2).flatten(),
        )


class PackedTowerSite(_TowerSite):
    """Items end to end, patches packed by a merger: Qwen2-VL, Qwen2.5-VL and Qwen3-VL.

    DeepStack features of inner blocks show each unit as that block left it.
    """

    tower_name = "visual"

    def __init__(self, owner: Any, stages: Callable[[], tuple[Stage, ...]]) -> None:
        from tokenreduce_integrations.transformers.observed_attention import observe

        super().__init__(owner, stages)
        attentions: list[Any] = [block.attn for block in self._stack.blocks]
        # FlashAttention takes no mask: it serves stages that only drop, which need none.
        self._observations = [observe(a, _segment_mask) for a in attentions if takes_bias(a)]
        mergers = (self._tower.merger, *getattr(self._tower, "deepstack_merger_list", ()))
        self._replaced = [wrap_method(merger, "forward", self._merge) for merger in mergers]

    def detach(self) -> None:
        """See :class:`watch.EncoderSite`."""
        for observation in self._observations:
            observation.remove()
        replaced, self._replaced = self._replaced, []
        try:
            restore_methods(replaced)
        finally:
            super().detach()

    @property
    def _prefix(self) -> int:
        return 0

    def _feature_depths(self, given: Given) -> list[int]:
        return [len(self._stack.blocks)]

    def _exposed(self, given: Given) -> frozenset[int]:
        return super()._exposed(given) | set(getattr(self._tower, "deepstack_visual_indexes", ()))

    def _merge(self, call: Callable[..., Any], args: tuple[Any, ...], kwargs: Any) -> Any:
        walk = self._stack.walk
        return call(*args, **kwargs) if walk is None else walk.merge(call, args, kwargs)

    def _walk(self, modality: str, stages: tuple[Stage, ...], given: Given) -> PackedWalk:
        merge = self._tower.spatial_merge_size
        grids = given[f"{modality}_grid_thw"]
        layouts = [Layout.from_grid((t, h // merge, w // merge)) for t, h, w in grids.tolist()]
        return PackedWalk(
            stages,
            self._exposed(given),
            layouts,
            merge * merge,
            self._window_order(grids, given),
            len(self._stack.blocks),
        )

    def _window_order(self, grids: Tensor, given: Given) -> Tensor | None:
        """The unit at each place of a sequence that is sorted by attention windows."""
        if not hasattr(self._tower, "window_size"):
            return None
        from transformers.vision_utils import get_vision_window_index

        order: Tensor = get_vision_window_index(
            grids,
            spatial_merge_size=self._tower.spatial_merge_size,
            window_size=self._tower.window_size,
            patch_size=self._tower.patch_size,
            kwargs=dict(given),
        )[0]
        return order

    def _outcomes(
        self, walk: PackedWalk, given: Given, layouts: Sequence[Layout]
    ) -> list[ItemOutcome]:
        if not walk.engaged:
            raise StageNotEngaged(
                "the encoder ran, but its blocks were never seen: it ran compiled before (attach "
                "first, or call torch.compiler.reset()), or something replaced their forward."
            )
        outcomes, start = [], 0
        for item, layout in enumerate(layouts):
            source = torch.arange(start, start + len(layout))
            start += len(layout)
            steps: list[Reduction | None] = []
            reasons: list[str] = []
            for index, stage in enumerate(walk.stages):
                trail = walk.trails.get(index)
                if trail is None:
                    steps.append(None)
                    reasons.append(why_kept(stage, self._depth(given), len(layout)))
                    continue
                device = trail.positions.device
                steps.append(carried(trail.assignment, trail.positions, source.to(device)))
                reasons.append(trail.reasons[item])
            outcomes.append(item_outcome(walk.stages, layout, steps, reasons))
        return outcomes


def _end_to_end(trail: Trail, rows: slice) -> tuple[Tensor, Tensor]:
    """Assignment and positions of several sequences, counted over all of them."""
    assignment, positions = trail.assignment[rows], trail.positions[rows]
    row = torch.arange(assignment.shape[0], device=assignment.device)[:, None]
    moved = assignment + row * positions.shape[1]
    return (
        torch.where(assignment < 0, assignment, moved).flatten(),
        (positions + row * assignment.shape[1]).flatten(),
    )


def _segment_mask(
    module: nn.Module, query: Tensor, key: Tensor, mask: Any, kwargs: dict[str, Any]
) -> Tensor | None:
    """The mask of a segment whose tokens were merged."""
    bias = kwargs.pop(BIAS, None)
    return None if bias is None else bias.next(key.shape[2])
