"""What differs between kinds of encoder blocks, as data."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from tokenreduce.errors import UnsupportedModel


@dataclass(frozen=True, kw_only=True)
class BlockKind:
    """Where things are in a block.

    Attributes:
        attention: its attribute that holds the attention module.
        keys: the submodule of the attention whose output are the keys.
        queries: likewise for the queries.
        mask: its argument that takes an attention mask; None if only its attention takes one.
        packed: whether it sees all items end to end, ``(S, D)``, instead of ``(B, S, D)``.
    """

    attention: str
    keys: str = "k_proj"
    queries: str = "q_proj"
    mask: str | None = "attention_mask"
    packed: bool = False


@dataclass(frozen=True)
class BlockCall:
    """A block that is called.

    Attributes:
        index: its place in the encoder.
        block: the module.
        attention: its attention module.
        mask: see :class:`BlockKind`.
        forward: its own forward, to be called with the hidden states and further arguments by name.
    """

    index: int
    block: nn.Module
    attention: Any
    mask: str | None
    forward: Callable[..., Any]


_ENCODER_LAYER = BlockKind(attention="self_attn")
_DINO = BlockKind(attention="attention")
# Identity or a norm, called with keys ``(B, H, S, D)``: some blocks never call their qkv module.
_TIMM = BlockKind(attention="attn", keys="k_norm", queries="q_norm", mask="attn_mask")
_QWEN = BlockKind(attention="attn", keys="qkv", queries="qkv", packed=True)

KINDS: dict[str, BlockKind] = {
    "CLIPEncoderLayer": _ENCODER_LAYER,
    "SiglipEncoderLayer": _ENCODER_LAYER,
    "Dinov2Layer": _DINO,
    "Dinov2WithRegistersLayer": _DINO,
    "InternVLVisionLayer": BlockKind(
        attention="attention", keys="k_norm", queries="q_norm", mask=None
    ),
    "Qwen2VLVisionBlock": _QWEN,
    "Qwen2_5_VLVisionBlock": _QWEN,
    "Qwen3VLVisionBlock": _QWEN,
    "Block": _TIMM,
    "ResPostBlock": _TIMM,
    "EvaBlock": _TIMM,
    "EvaBlockPostNorm": _TIMM,
}
_TIMM_ATTENTION = ("Attention", "AttentionRope", "EvaAttention")


def kind_of(block: nn.Module) -> BlockKind | None:
    """The kind of a block, by the name of its class; None if it is not known."""
    named = (KINDS[c.__name__] for c in type(block).__mro__ if c.__name__ in KINDS)
    kind = next(named, None)
    attention = getattr(block, kind.attention, None) if kind is not None else None
    if kind is None or attention is None or not hasattr(attention, kind.keys):
        return None
    if kind is _TIMM and type(attention).__name__ not in _TIMM_ATTENTION:
        return None
    takes = inspect.signature(type(block).forward).parameters
    known = kind.mask is None or kind.packed or kind.mask in takes
    return kind if known else None


def find_blocks(encoder: nn.Module) -> tuple[list[nn.Module], BlockKind]:
    """The blocks of an encoder.

    Raises:
        UnsupportedModel: if it has none in which a stage would have an effect.
    """
    lists = [m for m in encoder.modules() if isinstance(m, nn.ModuleList | nn.Sequential) and m]
    for blocks in lists:
        kinds = {kind_of(block) for block in blocks}
        if len(kinds) == 1 and (kind := kinds.pop()) is not None:
            return list(blocks), kind
    longest = max(lists, key=len, default=None)
    what = "no list of blocks"
    if longest is not None:
        unknown = next((b for b in longest if kind_of(b) is None), longest[0])
        what = f"blocks of class {type(unknown).__name__}"
        attentions = (getattr(unknown, name, None) for name in ("attn", "self_attn", "attention"))
        attention = next((a for a in attentions if isinstance(a, nn.Module)), None)
        if attention is not None:
            what += f" with {type(attention).__name__}"
    raise UnsupportedModel(
        f"{type(encoder).__name__} has {what}, in which a stage at the site 'vision' would have no "
        f"effect, or a wrong one. Known blocks: {', '.join(KINDS)}. Use a stage at the projector "
        "site."
    )


def heads_of(attention: Any) -> int:
    """Number of attention heads."""
    return int(getattr(attention, "num_heads", None) or attention.num_attention_heads)


def per_head(raw: Tensor, attention: Any) -> Tensor:
    """Queries or keys ``(B, S, H D)`` or ``(B, H, S, D)`` as ``(B, H, S, D)``."""
    if raw.ndim == 4:
        return raw
    heads: Tensor = raw.unflatten(-1, (heads_of(attention), -1))
    return heads.transpose(1, 2)


def packed_keys(raw: Tensor, attention: Any) -> Tensor:
    """The keys ``(S, H, D)`` in the output ``(S, 3 H D)`` of a fused projection."""
    parts: Tensor = raw.unflatten(-1, (3, heads_of(attention), -1))
    return parts[:, 1]


def takes_bias(attention: Any) -> bool:
    """Whether the kernel of an attention module takes an additive mask."""
    name = str(getattr(getattr(attention, "config", None), "_attn_implementation", "sdpa"))
    return name.endswith(("sdpa", "eager"))
