"""What the keys and values of one token take in the layers of an LLM."""

from __future__ import annotations

from typing import Any

#: Types of layers, as configurations name them, that hold keys and values of each token.
_ATTENTION = (
    "full_attention",
    "sliding_attention",
    "chunked_attention",
    "window_attention",
    "reference_sliding_attention",
    "indexed_attention",
    "minimax_m3_sparse",
    "hybrid",
    "hybrid_sliding",
)
#: Types that hold none.
_WITHOUT = ("linear_attention", "conv", "mamba", "moe", "mlp", "sparse", "dense")


def kv_bytes_by_layer(decoder: Any) -> tuple[int, ...] | None:
    """Bytes of keys and values of one visual token in each layer of a decoder.

    Layers that hold none (linear attention, convolutions, layers that read the keys of another)
    count 0. What is held besides, as the index of sparse attention, is left out. Where another
    decoder attends to what this one hands on, its layers' bytes stand at the last layer.

    Returns:
        one number for each layer; None if a layer compresses keys and values in a way that is not
        known.
    """
    config, parameter = decoder.config, next(decoder.parameters())
    element = parameter.element_size() if parameter.is_floating_point() else 2
    count = int(config.num_hidden_layers)
    if getattr(config, "is_encoder_decoder", False):
        names = ("num_decoder_layers", "decoder_layers")
        readers = next(getattr(config, name) for name in names if hasattr(config, name))
        return (0,) * (count - 1) + (2 * _key_width(config) * int(readers) * element,)
    widths = [_width(decoder, layer) for layer in range(count)]
    known = [width for width in widths if width is not None]
    return tuple(width * element for width in known) if len(known) == count else None


def kv_bytes_per_token(decoder: Any) -> int | None:
    """Bytes of keys and values of one visual token over all layers; None if they are not known."""
    layers = kv_bytes_by_layer(decoder)
    return None if layers is None else sum(layers)


def _width(decoder: Any, layer: int) -> int | None:
    """Channels of a layer's keys and values of visual tokens together."""
    config = decoder.config
    crossing = getattr(config, "cross_attention_layers", None)
    shared = getattr(config, "num_kv_shared_layers", None) or 0
    kind = (getattr(config, "layer_types", None) or {layer: _ATTENTION[0]})[layer]
    if kind in _WITHOUT or (crossing is not None and layer not in crossing):
        return 0
    if layer >= config.num_hidden_layers - shared:
        return 0
    if kind not in _ATTENTION:
        return None
    if getattr(config, "kv_lora_rank", None):
        # Latent attention holds what one projection gives: the latent, and keys with positions.
        attention = getattr(decoder.layers[layer], "self_attn", None)
        down = getattr(attention, "kv_a_proj_with_mqa", None)
        return None if down is None else int(down.out_features)
    per_layer = getattr(config, "per_layer_config", None)
    return 2 * _key_width(per_layer[layer] if per_layer else config)


def _key_width(config: Any) -> int:
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(heads) * int(width)
