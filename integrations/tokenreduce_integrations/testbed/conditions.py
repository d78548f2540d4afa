"""What makes clips less still: noise, flicker, a camera that moves, water, traffic.

A condition changes the pixels of a clip, not what happens in it: shapes, paths, questions and
answers stay as they are. Nothing was trained under any of them.
"""

from dataclasses import asdict, dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

_WAVELENGTH: Final = 24
"""Pixels from crest to crest of a ripple."""
_WAVE_FRAMES: Final = 5
"""Frames in which a ripple travels its wavelength."""
_BAR_SPEEDS: Final = (2.0, 5.0)
_BAR_WIDTHS: Final = (2, 3)
_BAR_LENGTHS: Final = (6, 13)
_BAR_VALUES: Final = (20, 230)


@dataclass(frozen=True)
class Conditions:
    """How a clip is filmed. The defaults change nothing.

    Attributes:
        noise: Standard deviation of noise in every channel of every pixel, in levels of 255,
            beside what every clip has.
        flicker: The exposure of each frame is off by up to this share, evenly distributed.
        shake: Every frame is off by up to so many pixels in each direction, evenly distributed.
        pan: Pixels that the camera moves from frame to frame, in a random direction; it looks
            straight ahead in the middle of the clip.
        ripple: Pixels by which a wave that travels through the background displaces it.
        bars: Grey bars that pass behind the shapes, each in a direction of its own; no question is
            about bars.

    Raises:
        ValueError: If a value is negative, or frames could turn black.
    """

    noise: float = 0.0
    flicker: float = 0.0
    shake: int = 0
    pan: float = 0.0
    ripple: float = 0.0
    bars: int = 0

    def __post_init__(self) -> None:
        values = asdict(self)
        if min(values.values()) < 0 or self.flicker >= 1:
            raise ValueError(f"conditions must not be negative, and flicker below 1: {values}")

    def windows(self, rng: np.random.Generator, frames: int) -> NDArray[np.int64]:
        """Where the camera looks: ``(x, y)`` offsets of each frame, int64 ``(frames, 2)``."""
        angle = rng.uniform(0, 2 * np.pi)
        travelled = self.pan * (np.arange(frames) - (frames - 1) / 2)
        path = np.rint(travelled[:, None] * np.array([np.cos(angle), np.sin(angle)]))
        offsets: NDArray[np.int64] = path.astype(np.int64)
        return offsets + rng.integers(-self.shake, self.shake + 1, (frames, 2))

    def ground(
        self, rng: np.random.Generator, still: NDArray[np.float32], frames: int
    ) -> NDArray[np.float32]:
        """What is behind the shapes in each frame: ``(frames, H, W, 3)`` from ``(H, W, 3)``."""
        ground = np.repeat(still[None], frames, 0)
        if self.ripple:
            height, width, _ = still.shape
            y, x = np.mgrid[:height, :width]
            time = np.arange(frames)[:, None, None] / _WAVE_FRAMES
            crest = np.sin(2 * np.pi * (x / _WAVELENGTH - time + rng.random()))
            ground = still[(y + np.rint(self.ripple * crest).astype(int)).clip(0, height - 1), x]
        for _ in range(self.bars):
            _pass_bar(rng, ground)
        return ground

    def expose(self, rng: np.random.Generator, frames: NDArray[np.float32]) -> NDArray[np.float32]:
        """Flicker and noise, on frames ``(F, H, W, 3)``."""
        gain = 1 + self.flicker * rng.uniform(-1, 1, (len(frames), 1, 1, 1))
        exposed = frames * gain.astype(np.float32)
        if self.noise:
            exposed += np.float32(self.noise) * rng.standard_normal(frames.shape, dtype=np.float32)
        return exposed


def _pass_bar(rng: np.random.Generator, ground: NDArray[np.float32]) -> None:
    """Let a grey bar pass through frames ``(F, H, W, 3)``, which are changed in place."""
    frames, *size, _ = ground.shape
    extent = [rng.integers(low, high + 1) for low, high in (_BAR_WIDTHS, _BAR_LENGTHS)]
    extent = extent[:: rng.choice([-1, 1])]
    middle = rng.uniform(0, size)
    angle, speed = rng.uniform(0, 2 * np.pi), rng.uniform(*_BAR_SPEEDS)
    value = rng.uniform(*_BAR_VALUES)
    for frame, image in enumerate(ground):
        way = speed * (frame - (frames - 1) / 2)
        corner = np.rint(middle + way * np.array([np.sin(angle), np.cos(angle)])).astype(int)
        (top, left), (bottom, right) = corner.clip(0), (corner + extent).clip(0)
        image[top:bottom, left:right] = value
