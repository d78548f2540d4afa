"""Clips for property tests: still, moving, cut, random and degenerate ones."""

from typing import NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor

from tokenreduce import Layout, VisualTokens


class Clip(NamedTuple):
    """A batch of clips: ``(B, T, P, D)`` features of a (T, H, W) grid, P = H W."""

    features: Tensor
    grid: tuple[int, int, int]

    def tokens(self, **signals: Tensor) -> VisualTokens:
        """The clips as tokens, with signals of shape ``(B, T, P)``."""
        flat = {name: signal.flatten(1, 2) for name, signal in signals.items()}
        return VisualTokens(self.features.flatten(1, 2), Layout.from_grid(self.grid), signals=flat)


def structured_clip(
    batch: int, grid: tuple[int, int, int], channels: int, *, change: float = 0.3, seed: int = 0
) -> Clip:
    """Clips of one still scene with some motion, and a cut in the middle."""
    frames, height, width = grid
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    scene = noise(batch, 1, height * width, channels) + 2 * noise(batch, 1, 1, channels)
    second = noise(batch, 1, height * width, channels)
    after = (torch.arange(frames) >= (frames + 1) // 2)[:, None, None]
    motion = change * noise(batch, frames, height * width, channels)
    return Clip(torch.where(after, second, scene) + motion, grid)


@st.composite
def clips(draw, *, max_frames=9, max_side=4, batches=2, min_channels=1):
    """Small clips."""
    grid = (
        draw(st.integers(1, max_frames)),
        draw(st.integers(1, max_side)),
        draw(st.integers(1, max_side)),
    )
    batch, channels = draw(st.integers(1, batches)), draw(st.integers(min_channels, 6))
    seed = draw(st.integers(0, 10_000))
    kind = draw(st.sampled_from(["structured", "random", "still", "zeros", "equal"]))
    clip = structured_clip(batch, grid, channels, seed=seed)
    features = clip.features
    if kind == "random":
        features = torch.randn(features.shape, generator=torch.Generator().manual_seed(seed))
    elif kind == "still":
        features = features[:, :1].expand_as(features).clone()
    elif kind in ("zeros", "equal"):
        features = torch.full_like(features, float(kind == "equal"))
    return Clip(features, grid)


def peaked(shape: tuple[int, ...], seed: int) -> Tensor:
    """Attention of a few tokens and little else, as encoders give it: it sums to one."""
    generator = torch.Generator().manual_seed(seed)
    return (5 * torch.randn(shape, generator=generator)).softmax(-1)
