"""Rendered clips with questions: shapes that move, one after the other, among shapes that do not.

The background, the clutter and the still shapes repeat from frame to frame, up to the noise of the
camera, unless other conditions are asked for; one or two shapes move. Two never move at once, so
that there is a first and a last. A clip is a function of ``(seed, split, index)`` and of the
conditions, and its questions are a function of the clip, as with scenes.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Final

import numpy as np
from numpy.typing import NDArray

from .conditions import Conditions
from .scenes import (
    COLOR_VALUES,
    IMAGE_SIZE,
    NOISE,
    SPLIT_CODES,
    Question,
    Split,
    draw_background,
    draw_clutter,
    draw_questions,
    pick,
    shape_coverage,
)
from .vocabulary import COLORS, DIRECTIONS, PLURALS, QUADRANTS, SHAPES

FRAMES: Final = 8
"""Frames of a clip."""

MOTION_TYPES: Final = ("moved", "moving", "direction", "order")
"""Question types that no single frame answers."""
STILL_TYPES: Final = ("color", "count", "where", "background")
"""Question types about what is in the clip."""
CLIP_QUESTION_TYPES: Final = (*MOTION_TYPES, *STILL_TYPES)
"""Types asked in an evaluation and in training."""

_CLIP_CODE: Final = 2
"""Keeps the random streams of clips apart from those of scenes."""
_STEPS: Final = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
_OBJECTS: Final = (3, 5)
_RADII: Final = (6, 10)
_TRAVEL: Final = (30, 48)
_QUADRANT_MARGIN: Final = 6
_DRAWS: Final = 40


@dataclass(frozen=True)
class Motion:
    """How a shape moves: at an even pace along one axis, still before and after.

    Attributes:
        direction: One of `DIRECTIONS`.
        start: Last frame before the shape moves.
        end: Frame in which it arrives.
        travel: Distance in pixels.
    """

    direction: str
    start: int
    end: int
    travel: int


@dataclass(frozen=True)
class ClipObject:
    """A shape of a clip; positions and sizes are in pixels.

    Attributes:
        shape: One of `SHAPES`.
        color: One of `COLORS`.
        radius: Half the side of the bounding square.
        centres: ``(x, y)`` of the centre in every frame.
        motion: None for a shape that stays where it is.
    """

    shape: str
    color: str
    radius: int
    centres: tuple[tuple[int, int], ...]
    motion: Motion | None = None


@dataclass(frozen=True)
class Clip:
    """Rendered frames with their ground truth.

    Attributes:
        frames: RGB pixels, uint8 ``(8, 96, 96, 3)``.
        objects: The shapes, whose squares never overlap.
        background: One of `BACKGROUNDS`.
        key: The ``(seed, split code, index)`` that the clip was generated from.
    """

    frames: NDArray[np.uint8]
    objects: tuple[ClipObject, ...]
    background: str
    key: tuple[int, int, int]

    @cached_property
    def movers(self) -> tuple[ClipObject, ...]:
        """The shapes that move, in the order in which they do."""
        movers = [(item.motion.start, item) for item in self.objects if item.motion is not None]
        return tuple(item for _, item in sorted(movers, key=lambda pair: pair[0]))


class ClipGenerator:
    """Deterministic source of clips and questions.

    Args:
        seed: Selects the sequence of clips.
        split: ``"train"`` and ``"test"`` draw from disjoint random streams.
        conditions: How the clips are filmed; the same things happen in them under all.

    Example:
        >>> generator = ClipGenerator(seed=7)
        >>> clip = generator.clip(0)
        >>> clip.frames.shape
        (8, 96, 96, 3)
        >>> sorted({question.type for question in generator.questions(clip)} & {"direction"})
        ['direction']
    """

    def __init__(
        self, seed: int, split: Split = "test", conditions: Conditions | None = None
    ) -> None:
        if split not in SPLIT_CODES:
            raise ValueError(f"split must be one of {sorted(SPLIT_CODES)}, got {split!r}")
        self.seed = seed
        self.split: Split = split
        self.conditions = conditions or Conditions()

    def clip(self, index: int) -> Clip:
        """Return the clip at a position of the sequence."""
        key = (self.seed, SPLIT_CODES[self.split], index)
        rng = np.random.default_rng((*key, _CLIP_CODE))
        still, background = draw_background(rng)
        draw_clutter(rng, still)
        objects = _draw_objects(rng)
        values = [
            (COLOR_VALUES[item.color] + rng.uniform(-15, 15, 3)).astype(np.float32)
            for item in objects
        ]
        filming = np.random.default_rng((*key, _CLIP_CODE, 2))
        windows = self.conditions.windows(filming, FRAMES)
        margin = int(abs(windows).max())
        around = np.pad(still, ((margin, margin), (margin, margin), (0, 0)), "reflect")
        frames = np.empty((FRAMES, *still.shape), np.float32)
        for frame, image in enumerate(self.conditions.ground(filming, around, FRAMES)):
            for item, value in zip(objects, values, strict=True):
                x, y = item.centres[frame]
                _paint(image, item, (x + margin, y + margin), value)
            left, top = margin + windows[frame]
            frames[frame] = image[top : top + IMAGE_SIZE, left : left + IMAGE_SIZE]
        frames = self.conditions.expose(filming, frames)
        noise = rng.standard_normal(frames.shape, dtype=np.float32)
        frames += noise * np.float32(rng.uniform(*NOISE))
        return Clip(frames.clip(0, 255).astype(np.uint8), objects, background, key)

    def questions(
        self,
        clip: Clip,
        count: int = 8,
        types: Sequence[str] | Mapping[str, float] = CLIP_QUESTION_TYPES,
    ) -> list[Question]:
        """Ask distinct questions about a clip.

        Args:
            clip: The clip to ask about.
            count: Number of questions wanted; a clip that has no more gives fewer.
            types: The types to take in turn, in a random order; or a mapping from type to the
                relative frequency with which it is drawn.

        Returns:
            Questions with different texts, the same ones for every call with equal arguments.
        """
        unknown = set(types) - set(CLIP_QUESTION_TYPES)
        if unknown:
            raise ValueError(
                f"unknown question types {sorted(unknown)}, known: {CLIP_QUESTION_TYPES}"
            )
        rng = np.random.default_rng((*clip.key, _CLIP_CODE, 1))
        return ask(rng, clip, count, types)


def ask(
    rng: np.random.Generator, clip: Clip, count: int, types: Sequence[str] | Mapping[str, float]
) -> list[Question]:
    """Ask distinct questions about a clip, drawn with `rng`; see `ClipGenerator.questions`."""
    return draw_questions(rng, count, types, lambda name: _ASK[name](clip, rng))


def _draw_objects(rng: np.random.Generator) -> tuple[ClipObject, ...]:
    """Draw shapes, of which the first one or two move; a moving shape occurs once."""
    placed = None
    while placed is None:
        number = int(rng.integers(_OBJECTS[0], _OBJECTS[1] + 1))
        motions: list[Motion | None] = [*_draw_motions(rng)]
        still = number - len(motions)
        motions += [None] * still
        placed = _place(rng, motions)
    shapes = [SHAPES[i] for i in rng.permutation(len(SHAPES))[:number]]
    if rng.random() < 0.5:
        shapes[-still:] = shapes[-1:] * still
    colors = [COLORS[i] for i in rng.integers(0, len(COLORS), number)]
    if rng.random() < 0.4:
        repeats = int(rng.integers(2, number + 1))
        colors[-repeats:] = colors[-1:] * repeats
    return tuple(
        ClipObject(shape, color, radius, centres, motion)
        for shape, color, (radius, centres), motion in zip(
            shapes, colors, placed, motions, strict=True
        )
    )


def _draw_motions(rng: np.random.Generator) -> list[Motion]:
    """Draw one motion, or two of which the second starts when the first has ended."""
    last = FRAMES - 1
    if rng.random() < 0.5:
        start = int(rng.integers(0, 3))
        spans = [(start, int(rng.integers(start + 4, last + 1)))]
    else:
        spans = [(0, 3), (int(rng.integers(3, 5)), last)]
    return [
        Motion(DIRECTIONS[rng.integers(4)], start, end, int(rng.integers(_TRAVEL[0], _TRAVEL[1])))
        for start, end in spans
    ]


def _place(
    rng: np.random.Generator, motions: Sequence[Motion | None]
) -> list[tuple[int, tuple[tuple[int, int], ...]]] | None:
    """Find a radius and a path for every shape, or None if one has no room."""
    occupied = np.zeros((IMAGE_SIZE, IMAGE_SIZE), bool)
    placed = []
    for motion in motions:
        path = _find_path(rng, occupied, motion)
        if path is None:
            return None
        placed.append(path)
    return placed


def _find_path(
    rng: np.random.Generator, occupied: NDArray[np.bool_], motion: Motion | None
) -> tuple[int, tuple[tuple[int, int], ...]] | None:
    """Find and reserve the squares that a shape passes; None after some tries."""
    for _ in range(_DRAWS):
        radius = int(rng.integers(_RADII[0], _RADII[1] + 1))
        x, y = (int(v) for v in rng.integers(radius + 1, IMAGE_SIZE - radius - 1, 2))
        centres = tuple(_centre(x, y, motion, frame) for frame in range(FRAMES))
        end_x, end_y = centres[-1]
        if not radius < min(end_x, end_y) <= max(end_x, end_y) < IMAGE_SIZE - radius - 1:
            continue
        reach = radius + 2
        (left, right), (top, bottom) = sorted((x, end_x)), sorted((y, end_y))
        box = np.s_[
            max(0, top - reach) : bottom + reach + 1, max(0, left - reach) : right + reach + 1
        ]
        if not occupied[box].any():
            occupied[box] = True
            return radius, centres
    return None


def _centre(x: int, y: int, motion: Motion | None, frame: int) -> tuple[int, int]:
    """Where a shape that starts at ``(x, y)`` is in a frame."""
    if motion is None:
        return x, y
    done = min(max((frame - motion.start) / (motion.end - motion.start), 0.0), 1.0)
    step_x, step_y = _STEPS[motion.direction]
    moved = round(done * motion.travel)
    return x + step_x * moved, y + step_y * moved


def _paint(
    image: NDArray[np.float32],
    item: ClipObject,
    centre: tuple[int, int],
    value: NDArray[np.float32],
) -> None:
    """Paint a shape into `image`, which is changed in place."""
    (x, y), radius = centre, item.radius
    box = np.s_[y - radius : y + radius + 1, x - radius : x + radius + 1]
    alpha = shape_coverage(item.shape, radius)[..., None]
    image[box] = image[box] * (1 - alpha) + value * alpha


_Draft = tuple[str, str] | None


def _unique(items: Sequence[ClipObject], attribute: str) -> list[ClipObject]:
    """Objects whose shape or colour no other has."""
    names = [getattr(item, attribute) for item in items]
    return [item for item, name in zip(items, names, strict=True) if names.count(name) == 1]


def _ask_moved(clip: Clip, rng: np.random.Generator) -> _Draft:
    if len(clip.movers) != 1:
        return None
    return _either(clip.movers[0], rng, "moved ?")


def _ask_order(clip: Clip, rng: np.random.Generator) -> _Draft:
    if len(clip.movers) != 2:
        return None
    rank = int(rng.integers(2))
    return _either(clip.movers[rank], rng, ("moved first ?", "moved last ?")[rank])


def _either(item: ClipObject, rng: np.random.Generator, rest: str) -> _Draft:
    """Ask for the shape or the colour of an object."""
    if rng.random() < 0.5:
        return f"what shape {rest}", item.shape
    return f"what color {rest}", item.color


def _ask_moving(clip: Clip, rng: np.random.Generator) -> _Draft:
    wanted = rng.random() < 0.5
    asked = [item for item in _unique(clip.objects, "shape") if (item.motion is None) != wanted]
    if not asked:
        return None
    return f"did the {pick(rng, asked).shape} move ?", "yes" if wanted else "no"


def _ask_direction(clip: Clip, rng: np.random.Generator) -> _Draft:
    item, motion = pick(rng, [(item, item.motion) for item in clip.objects if item.motion])
    return f"where did the {item.shape} move ?", motion.direction


def _ask_color(clip: Clip, rng: np.random.Generator) -> _Draft:
    item = pick(rng, _unique(clip.objects, "shape"))
    return f"what color is the {item.shape} ?", item.color


def _ask_count(clip: Clip, rng: np.random.Generator) -> _Draft:
    number = int(rng.integers(0, 4))
    # The number is drawn first, or most answers would be zero.
    if rng.random() < 0.5:
        present = [item.shape for item in clip.objects]
        names = [PLURALS[name] for name in SHAPES if present.count(name) == number]
    else:
        present = [item.color for item in clip.objects]
        names = [f"{name} things" for name in COLORS if present.count(name) == number]
    return (f"how many {pick(rng, names)} are there ?", str(number)) if names else None


def _ask_where(clip: Clip, rng: np.random.Generator) -> _Draft:
    half = IMAGE_SIZE / 2
    clear = [
        (item, x, y)
        for item in _unique(clip.objects, "shape")
        for x, y in item.centres[:1]
        if item.motion is None and min(abs(x - half), abs(y - half)) >= _QUADRANT_MARGIN
    ]
    if not clear:
        return None
    item, x, y = pick(rng, clear)
    return f"where is the {item.shape} ?", QUADRANTS[2 * (y > half) + (x > half)]


def _ask_background(clip: Clip, rng: np.random.Generator) -> _Draft:
    return "what is the background ?", clip.background


_ASK: Final[dict[str, Callable[[Clip, np.random.Generator], _Draft]]] = {
    "moved": _ask_moved,
    "moving": _ask_moving,
    "direction": _ask_direction,
    "order": _ask_order,
    "color": _ask_color,
    "count": _ask_count,
    "where": _ask_where,
    "background": _ask_background,
}
