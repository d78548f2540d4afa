"""An independent recomputation of towers that merge inside: one image at a time, in paper notation.

Sequences hold what is left of units; ``groups`` lists the units that each stands for.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.vision_utils import get_vision_position_ids

import tokenreduce as tr
from support.tiny_models import Case, Item


@dataclass
class Sequence:
    """One sequence of a tower.

    ``prefix`` ``(P, D)``, ``units`` ``(n, u, D)``; ``groups[i]`` are the source units of unit i,
    ``places[i]`` the one that it stands at.
    """

    prefix: Tensor
    units: Tensor
    groups: list[list[int]] = field(default_factory=list)
    places: list[int] = field(default_factory=list)
    grid: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        self.groups = [[i] for i in range(len(self.units))]
        self.places = list(range(len(self.units)))

    @property
    def tokens(self) -> Tensor:
        return torch.cat([self.prefix, self.units.flatten(0, 1)])

    @property
    def log_sizes(self) -> Tensor:
        sizes = torch.tensor([float(len(group)) for group in self.groups])
        return torch.cat(
            [torch.zeros(len(self.prefix)), sizes.log().repeat_interleave(self.units.shape[1])]
        )

    def update(self, tokens: Tensor) -> None:
        count = len(self.prefix)
        self.prefix, self.units = tokens[:count], tokens[count:].reshape(self.units.shape)

    def cut(self, reducer: tr.Reducer, keep: int, keys: Tensor) -> None:
        """One call of the strategy; ``keys`` ``(S, d)`` are averaged over heads."""
        unit = self.units.shape[1]
        metric = keys[len(self.prefix) :].reshape(-1, unit, keys.shape[-1]).mean(1)
        whole = len(self.places) == math.prod(self.grid)
        layout = tr.Layout.from_grid(self.grid) if whole else tr.Layout.line(len(self.units))
        result = reducer.with_budget(keep=keep)(
            tr.VisualTokens(
                self.units.flatten(1)[None],
                layout,
                sizes=torch.tensor([[float(len(group)) for group in self.groups]]),
                signals={"keys": metric[None]},
            )
        )
        groups: list[list[int]] = [[] for _ in range(result.kept)]
        for source, output in enumerate(result.assignment[0].tolist()):
            if output >= 0:
                groups[output] += self.groups[source]
        self.places = [self.places[i] for i in result.positions[0].tolist()]
        self.groups = groups
        self.units = result.features[0].unflatten(1, (unit, -1))


def attend(
    q: Tensor, k: Tensor, v: Tensor, scale: float, log_sizes: Tensor, allowed: Tensor | None = None
) -> Tensor:
    """``softmax(q k^T scale + log s) v`` of ``(S, H, d)``, over heads ``(S, H d)``."""
    logits = torch.einsum("shd,thd->hst", q, k) * scale + log_sizes
    if allowed is not None:
        logits = logits.masked_fill(~allowed, float("-inf"))
    return torch.einsum("hst,thd->shd", logits.softmax(-1), v).flatten(1)


def heads(x: Tensor, count: int) -> Tensor:
    return x.unflatten(-1, (count, -1))


def clip_block(block: Any, sequence: Sequence) -> Tensor:
    """Runs a block of CLIP or SigLIP; returns keys ``(S, H, d)``."""
    x, attention = sequence.tokens, block.self_attn
    h = block.layer_norm1(x)
    q, k, v = (heads(getattr(attention, f"{name}_proj")(h), attention.num_heads) for name in "qkv")
    x = x + attention.out_proj(attend(q, k, v, attention.scale, sequence.log_sizes))
    sequence.update(x + block.mlp(block.layer_norm2(x)))
    return k


def dino_block(block: Any, sequence: Sequence) -> Tensor:
    x, attention = sequence.tokens, block.attention
    h = block.norm1(x)
    q, k, v = (
        heads(getattr(attention, f"{name}_proj")(h), attention.num_attention_heads)
        for name in "qkv"
    )
    mixed = attention.o_proj(attend(q, k, v, attention.scaling, sequence.log_sizes))
    x = x + block.layer_scale1(mixed)
    sequence.update(x + block.layer_scale2(block.mlp(block.norm2(x))))
    return k


def intern_block(block: Any, sequence: Sequence) -> Tensor:
    x, attention = sequence.tokens, block.attention
    h = block.layernorm_before(x)
    q, k, v = (heads(getattr(attention, f"{name}_proj")(h), attention.num_heads) for name in "qkv")
    mixed = attention.projection_layer(attend(q, k, v, attention.scale, sequence.log_sizes))
    x = x + block.lambda_1 * mixed
    sequence.update(x + block.lambda_2 * block.mlp(block.layernorm_after(x)))
    return k


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos[:, None] + torch.cat([-second, first], -1) * sin[:, None]


def qwen_block(
    block: Any, sequence: Sequence, rotary: tuple[Tensor, Tensor], segments: Tensor
) -> Tensor:
    x, attention, unit = sequence.tokens, block.attn, sequence.units.shape[1]
    rows = (torch.tensor(sequence.places)[:, None] * unit + torch.arange(unit)).flatten()
    cos, sin = (part[rows] for part in rotary)
    q, k, v = heads(attention.qkv(block.norm1(x)), 3 * attention.num_heads).chunk(3, 1)
    segment = segments[sequence.places].repeat_interleave(unit)
    mixed = attend(
        rotate(q, cos, sin),
        rotate(k, cos, sin),
        v,
        attention.scaling,
        sequence.log_sizes,
        segment[:, None] == segment,
    )
    x = x + attention.proj(mixed)
    sequence.update(x + block.mlp(block.norm2(x)))
    return k


BLOCKS = {
    "CLIPEncoderLayer": clip_block,
    "SiglipEncoderLayer": clip_block,
    "Dinov2Layer": dino_block,
    "InternVLVisionLayer": intern_block,
}


def left_after(count: int, keep: int, block: int, depth: int) -> int:
    """Tokens after a block, if an equal part goes after each of ``depth`` blocks."""
    return count - (count - keep) * block // depth


def dense_sequence(tower: Any, pixels: Tensor, unit: int) -> Sequence:
    """The sequence of an image ``(C, H, W)`` before the first block."""
    x = tower.embeddings(pixels[None])[0]
    if hasattr(tower, "pre_layrnorm"):
        x = tower.pre_layrnorm(x)
    side = int(len(x) ** 0.5)
    prefix, patches = x[: len(x) - side * side], x[len(x) - side * side :]
    blocks = patches.reshape(side // unit, unit, side // unit, unit, -1).transpose(1, 2)
    grid = (side // unit, side // unit)
    return Sequence(prefix, blocks.reshape(-1, unit * unit, x.shape[1]), grid=grid)


def run_dense(
    tower: Any, pixels: Tensor, reducer: tr.Reducer, keep: int, depth: int, unit: int = 1
) -> Sequence:
    """What is left of an image after ``depth`` blocks."""
    sequence = dense_sequence(tower, pixels, unit)
    count = len(sequence.units)
    layers = tower.encoder.layers if hasattr(tower.encoder, "layers") else tower.encoder.layer
    for number, block in enumerate(layers[:depth], start=1):
        keys = BLOCKS[type(block).__name__](block, sequence)
        left = left_after(count, keep, number, depth)
        if left < len(sequence.units):
            sequence.cut(reducer, left, keys.mean(1))
    return sequence


@dataclass
class Told:
    """Stands in for a reduction of the tokens that the LLM sees."""

    positions: Tensor
    features: Tensor
    deepstack: Iterator[Tensor]

    def apply(self, _: Tensor) -> Tensor:
        return next(self.deepstack)


def told(
    kept: list[int], features: Tensor, deepstack: list[Tensor] | None = None
) -> tuple[Tensor, Tensor, list[Tensor]]:
    return torch.tensor(kept), features, deepstack or []


def tiles(item: Item) -> int:
    return 1 + max(block for block, *_ in item.coords)


def joined(answers: list[Any], counts: list[int]) -> list[Any]:
    """Answers for images, from those for their tiles."""
    images, rest = [], iter(answers)
    for count in counts:
        stocks, answered = zip(*itertools.islice(rest, count), strict=True)
        starts = itertools.accumulate(map(len, stocks), initial=0)
        kept = [places + start for (places, _, _), start in zip(answered, starts, strict=False)]
        features = torch.cat([features for _, features, _ in answered])
        images.append((torch.cat(stocks), (torch.cat(kept), features, [])))
    return images


class TowerOracle:
    """Answers like a reducer for each visual item of a case, whose tokens it knows by heart.

    Args:
        case: the model and its inputs.
        reducer: the strategy inside the tower.
        share: of the tokens that the tower keeps.
    """

    def __init__(self, case: Case, reducer: tr.Reducer, share: float) -> None:
        self.case, self.reducer, self.share = case, reducer, share
        self.model = case.model.model
        with torch.no_grad():
            self.answers = [*self._items(case.inputs, "image"), *self._items(case.inputs, "video")]
        if type(self.model).__name__ == "InternVLModel":
            self.answers = joined(self.answers, [tiles(item) for item in case.items])

    def __call__(self, tokens: tr.VisualTokens) -> Told:
        for stock, (kept, features, deepstack) in self.answers:
            if stock.shape == tokens.features[0].shape and torch.allclose(
                stock, tokens.features[0], atol=1e-4
            ):
                return Told(kept[None], features[None], iter([d[None] for d in deepstack]))
        raise AssertionError("an item that the oracle does not know")

    def _items(
        self, inputs: dict[str, Any], modality: str
    ) -> Iterator[tuple[Tensor, tuple[Tensor, Tensor, list[Tensor]]]]:
        name = "pixel_values" if modality == "image" else "pixel_values_videos"
        if name not in inputs:
            return
        arguments = {
            key: inputs[key] for key in ("image_sizes", f"{modality}_grid_thw") if key in inputs
        }
        encode = getattr(self.model, f"get_{modality}_features")
        stock = encode(inputs[name], **arguments, return_dict=True).pooler_output
        kind = type(self.model).__name__
        for index, features in enumerate(stock):
            if kind.startswith("Qwen"):
                yield features, self._qwen(inputs, modality, index)
            elif "image_sizes" in inputs:
                yield features, self._tiles(inputs, index, features)
            else:
                yield features, self._plain(inputs[name][index], kind == "InternVLModel")

    def _keep(self, count: int) -> int:
        return max(1, int(self.share * count + 0.5))

    def _depth(self) -> int:
        layers = self.model.vision_tower.config.num_hidden_layers
        return layers + 1 + self.model.config.vision_feature_layer

    def _plain(self, pixels: Tensor, packs: bool) -> tuple[Tensor, Tensor, list[Tensor]]:
        tower, unit = self.model.vision_tower, 2 if packs else 1
        count = (pixels.shape[-1] // 14 // unit) ** 2
        sequence = run_dense(tower, pixels, self.reducer, self._keep(count), self._depth(), unit)
        units = sequence.units
        if packs:
            units = tower.layernorm(units)
        features = self.model.multi_modal_projector(units.flatten(1)[None])[0]
        return told(sequence.places, features)

    def _tiles(
        self, inputs: dict[str, Any], index: int, stock: Tensor
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """The thumbnail, then the mosaic in lines that end in a newline; nothing is padded."""
        height, width = (max(1, round(int(n) / 56)) for n in inputs["image_sizes"][index])
        tower, project = self.model.vision_tower, self.model.multi_modal_projector
        kept, features, newlines = [], [], 16 + 4 * height * (4 * width + 1)
        count = 1 + height * width
        for tile in range(count):
            sequence = run_dense(
                tower,
                inputs["pixel_values"][index, tile],
                self.reducer,
                self._keep(16),
                self._depth(),
            )
            for place, unit in zip(sequence.places, sequence.units, strict=True):
                y, x = place // 4, place % 4
                if tile > 0:
                    y, x = y + 4 * ((tile - 1) // width), x + 4 * ((tile - 1) % width)
                kept.append(place if tile == 0 else 16 + y * (4 * width + 1) + x)
                features.append(project(unit[None])[0, 0])
        for place in range(16 + 4 * width, newlines, 4 * width + 1):
            kept.append(place)
            features.append(stock[place])
        order = sorted(range(len(kept)), key=kept.__getitem__)
        return told([kept[i] for i in order], torch.stack([features[i] for i in order]))

    def _qwen(
        self, inputs: dict[str, Any], modality: str, index: int
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        tower = self.model.visual
        grids = inputs[f"{modality}_grid_thw"]
        name = "pixel_values" if modality == "image" else "pixel_values_videos"
        grid = grids[index : index + 1]
        begin, size = int(grids[:index].prod(1).sum()), int(grid.prod())
        x = tower.patch_embed(inputs[name][begin : begin + size])
        if hasattr(tower, "pos_embed"):
            from transformers.vision_utils import get_vision_interpolation_indices_and_weights

            where, weight = get_vision_interpolation_indices_and_weights(
                grid,
                num_grid_per_side=tower.num_grid_per_side,
                mode="bilinear",
                align_corners=True,
                spatial_merge_size=2,
            )
            x = x + (tower.pos_embed(where) * weight[:, :, None]).sum(1)
        rotary = tower.rotary_pos_emb(x, get_vision_position_ids(grid, 2))
        t, h, w = (int(n) for n in grid[0])
        sequence = Sequence(x[:0], x.unflatten(0, (-1, 4)), grid=(t, h // 2, w // 2))
        coords = tr.Layout.from_grid((t, h // 2, w // 2)).coords
        frames, windows = coords[:, 1], coords[:, 1]
        if hasattr(tower, "window_size"):
            side = tower.window_size // 2 // tower.patch_size
            windows = (coords[:, 1] * 1000 + coords[:, 2] // side) * 1000 + coords[:, 3] // side
        count, depth = len(sequence.units), len(tower.blocks)
        stacked: list[tuple[list[list[int]], Tensor]] = []
        for number, block in enumerate(tower.blocks, start=1):
            whole = number - 1 in getattr(tower, "fullatt_block_indexes", range(depth))
            keys = qwen_block(block, sequence, rotary, frames if whole else windows)
            left = left_after(count, self._keep(count), number, depth)
            if left < len(sequence.units):
                sequence.cut(self.reducer, left, keys.mean(1))
            if number - 1 in getattr(tower, "deepstack_visual_indexes", ()):
                merger = tower.deepstack_merger_list[len(stacked)]
                stacked.append((sequence.groups, merger(sequence.units.flatten(0, 1))))
        deepstack = [
            torch.stack(
                [rows[next(i for i, g in enumerate(groups) if p in g)] for p in sequence.places]
            )
            for groups, rows in stacked
        ]
        return told(sequence.places, tower.merger(sequence.units.flatten(0, 1)), deepstack)
