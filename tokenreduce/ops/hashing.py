"""Pseudo-random numbers that depend on content and position, never on call order or device."""

import torch
from torch import Tensor

from tokenreduce.ops.similarity import CACHED_ENTRIES, l1_norm

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed integer
_MIX_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX_2 = -7723592293110705685  # 0x94D049BB133111EB


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift of signed 64-bit integers."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    """The finalizer of splitmix64 (Steele, Lea and Flood, OOPSLA 2014), on wrapped integers."""
    x = (x ^ _shift(x, 30)) * _MIX_1
    x = (x ^ _shift(x, 27)) * _MIX_2
    return x ^ _shift(x, 31)


def content_seed(features: Tensor) -> Tensor:
    """A seed for each item from the coarse content of its features.

    Three statistics are rounded to about three significant digits, so that the last bits of a
    float32 product, which differ between batch shapes, do not change the seed.

    Args:
        features: ``(B, N, D)``, N > 0.

    Returns:
        ``(B,)`` 64-bit integers.
    """
    batch, n, channels = features.shape
    # A few tokens at a time, which fit the cache: no copy of the features is made.
    parts = features.split(max(1, CACHED_ENTRIES // (batch * channels)), dim=1)
    size = l1_norm(features).double() / channels
    mean = (torch.sum(features, 2, dtype=torch.float32).double() / channels).mean(1)
    mean = mean.float()[:, None, None]
    off = [torch.linalg.vector_norm(part.float() - mean, dim=2) for part in parts]
    spread = (torch.cat(off, dim=1).double().square().mean(1) / channels).sqrt()
    half = size[:, : max(1, n // 2)]
    statistics = torch.stack([size.mean(1), half.mean(1), spread], 1)
    mantissa, exponent = torch.frexp(statistics)
    digits = (mantissa * 512).round().long() * 4096 + exponent.long()
    seed = torch.zeros_like(digits[:, 0])
    for column in digits.unbind(1):
        seed = _mix(seed * 31 + column + _GOLDEN)
    return seed


def counter_uniform(seed: Tensor, count: int) -> Tensor:
    """Uniform numbers in [0, 1): the n-th depends on the seed and n alone.

    Args:
        seed: ``(B,)`` 64-bit integers.
        count: how many for each seed.

    Returns:
        ``(B, count)`` float32.
    """
    counter = torch.arange(1, count + 1, device=seed.device) * _GOLDEN
    bits = _shift(_mix(_mix(seed)[:, None] + counter), 40)
    return bits.float() / (1 << 24)
