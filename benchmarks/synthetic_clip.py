"""Features of a clip with realistic temporal redundancy, frame by frame.

Shots of 6 to 44 frames, three in ten of them returning to an earlier scene; in each a background of
24 textures with detail that stays, sensor noise, a slow change of light, two to five objects that
move across it, and 4 % of the places flickering. On the default settings the difference between
neighbouring frames (as a share of that of two tokens) has median 0.11, and a fifth of the tokens
differ by more than 0.25.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

TEXTURES, NOISES = 24, 4096


class SyntheticClip:
    """Frames of ``side * side`` tokens.

    Args:
        frames: how many.
        side: tokens of a side of a frame.
        channels: width of the features.
        seed: of everything.
    """

    def __init__(self, frames: int, *, side: int = 16, channels: int = 1024, seed: int = 0) -> None:
        self.frames, self.side, self.channels, self.seed = frames, side, channels, seed
        random = torch.Generator().manual_seed(seed)
        self._offset = 0.8 * torch.randn(channels, generator=random)
        self._noise = torch.randn(NOISES, channels, generator=random)
        self._shots: list[tuple[int, int]] = []
        scenes = length = 0
        while length < frames:
            returns = scenes > 2 and float(torch.rand(1, generator=random)) < 0.3
            scene = _integer(0, scenes, random) if returns else scenes
            scenes = max(scenes, scene + 1)
            shot = min(_integer(6, 45, random), frames - length)
            self._shots.append((scene, shot))
            length += shot

    def __iter__(self) -> Iterator[Tensor]:
        """``(side * side, channels)`` float32 for each frame."""
        for number, (scene, length) in enumerate(self._shots):
            yield from self._shot(number, scene, length)

    def _shot(self, number: int, scene: int, length: int) -> Iterator[Tensor]:
        side, places = self.side, self.side**2
        axes = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
        at = torch.stack(axes, -1).reshape(places, 1, 2)
        random = torch.Generator().manual_seed(1000 * self.seed + scene)
        centres = torch.rand(TEXTURES, 2, generator=random) * side
        texture = torch.randn(TEXTURES, self.channels, generator=random)
        detail = 0.5 * torch.randn(places, self.channels, generator=random)
        near = (at - centres).square().sum(-1).argmin(1)
        background = self._offset + texture[near] + detail
        random = torch.Generator().manual_seed(7919 * self.seed + 100_003 * number + 1)
        objects = _integer(2, 6, random)
        look = torch.randn(objects, self.channels, generator=random)
        size = torch.randint(1, 4, (objects,), generator=random)
        start = torch.rand(objects, 2, generator=random) * side
        velocity = 0.7 * torch.randn(objects, 2, generator=random)
        light = 0.02 * torch.randn(self.channels, generator=random)
        for frame in range(length):
            features = background + frame * light
            covers = ((at - (start + frame * velocity) % side).abs() < size[:, None]).all(-1)
            for number, covered in enumerate(covers.T):
                places_of = covered.nonzero()[:, 0]
                surface = detail[(7 * places_of + number) % places]
                features[places_of] = self._offset + look[number] + 0.8 * surface
            features += 0.4 * self._drawn(places, random)
            flicker = torch.rand(places, 1, generator=random) < 0.04
            yield features + flicker * 0.8 * self._drawn(places, random)

    def _drawn(self, count: int, random: torch.Generator) -> Tensor:
        return self._noise[torch.randint(NOISES, (count,), generator=random)]


def _integer(low: int, high: int, random: torch.Generator) -> int:
    return int(torch.randint(low, high, (1,), generator=random))
