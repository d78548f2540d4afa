"""From what stays to a surgery plan, with every setting that changes along."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import Any

from tokenreduce_integrations.pruning.encoders import Encoder, Part
from tokenreduce_integrations.pruning.surgery import Setting, Slice, SurgeryPlan

_DEPTHS = ("num_hidden_layers", "depth")
_FEATURE_LAYERS = ("vision_feature_layer", "vision_feature_layers")
#: Lists of blocks by index: those that see whole pictures, and those whose output the LLM is given.
_INDEXED = ("fullatt_block_indexes", "deepstack_visual_indexes")


def make_plan(
    model: Any,
    encoder: Encoder,
    *,
    kept_blocks: Sequence[int],
    kept_groups: Mapping[str, Sequence[int]],
    record: Mapping[str, Any],
) -> SurgeryPlan:
    """The plan that keeps some blocks, and some groups of channels of some parts.

    Args:
        model: the whole model.
        encoder: its encoder.
        kept_blocks: ascending indices.
        kept_groups: by path of the part, ascending indices of its heads or channels.
        record: how the choice came about.
    """
    slices: dict[str, Slice] = {}
    attributes: dict[str, dict[str, Any]] = {}
    for index in kept_blocks:
        block = encoder.blocks[index]
        for part in (block.attention, block.mlp):
            if part is not None and part.path in kept_groups:
                _cut(part, kept_groups[part.path], slices, attributes)
    indexed = {
        name: [kept_blocks.index(i) for i in getattr(encoder.module, name) if i in kept_blocks]
        for name in _INDEXED
        if hasattr(encoder.module, name)
    }
    if len(kept_blocks) < len(encoder.blocks) and indexed:
        attributes[""] = dict(indexed)
    return SurgeryPlan(
        encoder=encoder.path,
        blocks=encoder.blocks_path,
        kept=tuple(kept_blocks),
        slices=slices,
        attributes=attributes,
        settings=tuple(_settings(model, encoder, kept_blocks, kept_groups, indexed)),
        record=record,
    )


def _cut(
    part: Part,
    kept: Sequence[int],
    slices: dict[str, Slice],
    attributes: dict[str, dict[str, Any]],
) -> None:
    channels = tuple(group * part.group + c for group in kept for c in range(part.group))
    rows = tuple(copy * part.channels + c for copy in range(part.fused) for c in channels)
    for name in part.writers:
        slices[f"{part.path}.{name}"] = Slice(rows=rows)
    for name in part.norms:
        slices[f"{part.path}.{name}"] = Slice(rows=channels)
    slices[f"{part.path}.{part.reader}"] = Slice(columns=channels)
    changed = dict.fromkeys(part.counts, len(kept)) | dict.fromkeys(part.widths, len(channels))
    if changed:
        attributes[part.path] = changed


def _settings(
    model: Any,
    encoder: Encoder,
    kept_blocks: Sequence[int],
    kept_groups: Mapping[str, Sequence[int]],
    indexed: Mapping[str, Any],
) -> list[Setting]:
    """What changes in the configuration, so that it says of the pruned model what it can say."""
    found: list[Setting] = []

    def change(path: str, name: str, after: Any) -> None:
        owner = model
        for step in path.split("."):
            owner = getattr(owner, step)
        before = getattr(owner, name, None)
        if before is not None and before != after:
            found.append(Setting(path=path, name=name, before=before, after=after))

    vision = "config.vision_config"
    widths = {
        len(kept_groups[block.mlp.path]) if block.mlp.path in kept_groups else block.mlp.groups
        for index in kept_blocks
        if (block := encoder.blocks[index]).mlp is not None
    }
    if len(widths) == 1:
        change(vision, "intermediate_size", widths.pop())
    if len(kept_blocks) < len(encoder.blocks):
        for name in _DEPTHS:
            change(vision, name, len(kept_blocks))
        for name, after in indexed.items():
            change(vision, name, after)
        for name in _FEATURE_LAYERS:
            chosen = getattr(model.config, name, None)
            if isinstance(chosen, int):
                change("config", name, _moved(encoder, chosen, kept_blocks))
            elif chosen is not None:
                change("config", name, [_moved(encoder, i, kept_blocks) for i in chosen])
    return found


def last_read(model: Any, encoder: Encoder) -> int:
    """Index of the last block whose output is read."""
    count = len(encoder.blocks)
    named = (getattr(model.config, name, None) for name in _FEATURE_LAYERS)
    chosen = next((value for value in named if value is not None), -1)
    layers = [chosen] if isinstance(chosen, int) else list(chosen)
    first = first_state(encoder)
    return max(i + first if i >= 0 else count + 1 + i for i in layers) - 1


def first_state(encoder: Encoder) -> int:
    """How many blocks the first hidden state of an encoder has behind it: timm's has one."""
    return int(hasattr(encoder.module, "timm_model"))


def _moved(encoder: Encoder, index: int, kept: Sequence[int]) -> int:
    if index < 0:
        return feature_layer(index, len(encoder.blocks), kept)
    first = first_state(encoder)
    return max(0, feature_layer(index + first, len(encoder.blocks), kept) - first)


def feature_layer(index: int, blocks: int, kept: Sequence[int]) -> int:
    """Where the hidden state ``index`` of an encoder of ``blocks`` blocks is after pruning.

    Hidden state 0 enters the first block and number ``i`` leaves the i-th; negative indices count
    from the last. Of a block that left, the state before it takes the place.
    """
    absolute = index if index >= 0 else blocks + 1 + index
    moved = bisect_right(kept, absolute - 1)
    return moved if index >= 0 else moved - len(kept) - 1
