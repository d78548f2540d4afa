"""Signals of vision towers by eager attention, pooled to the LLM's tokens one token at a time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.vision_utils import get_vision_window_index

from support.tiny_models import VIDEO, Case, Item

Patches = dict[str, Tensor]


@torch.no_grad()
def image_tower_patches(model: Any, pixels: Tensor) -> Patches:
    """Signals ``(T, patches, ...)`` of a tower that encodes pictures one by one, under eager
    attention."""
    owner = model.model
    tower, layer = owner.vision_tower, owner.config.vision_feature_layer
    before = tower.config._attn_implementation
    tower.set_attn_implementation("eager")
    layers = getattr(tower.encoder, "layers", None) or tower.encoder.layer
    seen: dict[str, Tensor] = {}
    attention_module = getattr(layers[layer], "self_attn", None) or layers[layer].attention
    handles = [
        getattr(attention_module, f"{part}_proj").register_forward_hook(
            lambda _, __, output, part=part: seen.__setitem__(part, output)
        )
        for part in ("q", "k")
    ]
    out = tower(pixels, output_attentions=True, output_hidden_states=True)
    for handle in handles:
        handle.remove()
    tower.set_attn_implementation(before)
    deep, shallow = out.attentions[layer].mean(1), out.attentions[0].mean(1)
    states = out.hidden_states[layer]
    if owner.config.model_type == "internvl":
        states = out.last_hidden_state
    first = states.shape[1] - (states.shape[1] // 4) * 4
    return {
        "vision_features": states[:, first:],
        "class_attention": deep[:, 0, first:],
        "shallow_class_attention": shallow[:, 0, first:],
        "received_attention": deep.mean(1)[:, first:],
        "keys": seen["k"][:, first:],
        "queries": seen["q"][:, first:],
    }


@torch.no_grad()
def native_tower_patches(model: Any, pixels: Tensor, grid: Tensor, block: int) -> Patches:
    """Signals ``(P, ...)`` of a packed tower, by a softmax over each whole sequence with a mask."""
    tower = model.model.visual
    attention = tower.blocks[block].attn
    seen: dict[str, Any] = {}

    def see(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.update(kwargs, states=args[0] if args else kwargs["hidden_states"])

    handles = [
        attention.register_forward_pre_hook(see, with_kwargs=True),
        tower.merger.register_forward_pre_hook(lambda _, args: seen.__setitem__("merged", args[0])),
    ]
    tower(pixels, grid_thw=grid)
    for handle in handles:
        handle.remove()
    states, (cosine, sine) = seen["states"], seen["position_embeddings"]
    query, key, _ = attention.qkv(states).unflatten(-1, (3, attention.num_heads, -1)).unbind(1)
    half = query.shape[-1] // 2

    def rotated(x: Tensor) -> Tensor:
        turned = torch.cat([-x[..., half:], x[..., :half]], -1)
        return x * cosine[:, None] + turned * sine[:, None]

    query, key = rotated(query), rotated(key)
    bounds = seen["cu_seqlens"]
    segment = torch.bucketize(torch.arange(len(states)), bounds[1:], right=True)
    apart = segment[:, None] != segment
    logits = torch.einsum("qhd,khd->hqk", query, key) * attention.scaling
    weights = logits.masked_fill(apart, float("-inf")).softmax(-1).mean(0)
    asking = (~apart).sum(0)
    patches = {
        "vision_features": seen["merged"],
        "received_attention": weights.sum(0) / asking,
        "keys": key.flatten(1),
        "queries": query.flatten(1),
    }
    if not hasattr(tower, "window_size"):
        return patches
    order, _ = get_vision_window_index(
        grid,
        spatial_merge_size=tower.spatial_merge_size,
        window_size=tower.window_size,
        patch_size=tower.patch_size,
    )
    ordered = {}
    for name, signal in patches.items():
        groups = signal.unflatten(0, (-1, 4))
        back = torch.empty_like(groups)
        back[order] = groups
        ordered[name] = back.flatten(0, 1)
    return ordered


def in_mosaic(item: Item, tiles: Tensor, side: int = 4) -> Tensor:
    """A signal of thumbnail and tiles ``(T, side * side, ...)`` at each token of an item; zero at
    newlines."""
    width = max(x for block, _, _, x in item.coords if block == 1)
    rows = []
    for index, (block, _, y, x) in enumerate(item.coords):
        if index in item.protected:
            rows.append(torch.zeros_like(tiles[0, 0]))
        elif block == 0:
            rows.append(tiles[0, y * side + x])
        else:
            tile = 1 + (y // side) * (width // side) + x // side
            rows.append(tiles[tile, (y % side) * side + x % side])
    return torch.stack(rows)


def halved(patches: Tensor, side: int = 4) -> Tensor:
    """The mean of each two by two patches of a square picture ``(side * side, ...)``."""
    square = patches.unflatten(0, (side, side))
    rows = [
        torch.stack([square[y + i, x + j] for i in (0, 1) for j in (0, 1)]).mean(0)
        for y in range(0, side, 2)
        for x in range(0, side, 2)
    ]
    return torch.stack(rows)


def expected(name: str, case: Case) -> dict[str, list[Tensor]]:
    """The signals of each item of a case."""
    inputs = case.inputs
    if name.startswith("qwen"):
        block = 1 if name != "qwen3-vl" else 2
        image, video = (
            native_tower_patches(case.model, inputs[pixels], inputs[grid], block)
            for pixels, grid in (
                ("pixel_values", "image_grid_thw"),
                ("pixel_values_videos", "video_grid_thw"),
            )
        )
        found: dict[str, list[Tensor]] = {signal: [] for signal in image}
        for signal in image:
            starts = {False: 0, True: 0}
            for item in case.items:
                is_video = item.token == VIDEO
                count = 4 * len(item.coords)
                source = (video if is_video else image)[signal]
                rows = source[starts[is_video] : starts[is_video] + count]
                starts[is_video] += count
                found[signal].append(rows.unflatten(0, (-1, 4)).mean(1))
        return found
    pixels = inputs["pixel_values"]
    if name.startswith("llava-next") or name == "onevision":
        pixels = torch.cat([pixels[0, :5], pixels[1, :3]])
    patches = image_tower_patches(case.model, pixels)
    if name.startswith("llava") and name != "llava-next":
        return {signal: list(rows) for signal, rows in patches.items()}
    if name == "internvl":
        tiles = [1 + item.coords[-1][0] for item in case.items]
        return {
            signal: [torch.cat([halved(tile) for tile in image]) for image in rows.split(tiles)]
            for signal, rows in patches.items()
        }
    images = {
        signal: [in_mosaic(case.items[0], rows[:5]), in_mosaic(case.items[1], rows[5:])]
        for signal, rows in patches.items()
    }
    if name == "onevision":
        clip = image_tower_patches(case.model, inputs["pixel_values_videos"][0])
        for signal, rows in clip.items():
            frames = torch.cat([halved(frame) for frame in rows])
            images[signal].append(torch.cat([frames, torch.zeros_like(frames[:1])]))
    return images
