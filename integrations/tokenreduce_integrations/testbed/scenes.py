"""Rendered scenes with questions: coloured shapes and handwritten digits on textured backgrounds.

A scene is a function of ``(seed, split, index)`` alone, and its questions are a function of the
scene, so that a result can be traced to the exact pictures it was measured on.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from .vocabulary import BACKGROUNDS, COLORS, PLURALS, QUADRANTS, RELATIONS, SHAPES

Split = Literal["train", "test"]

IMAGE_SIZE: Final = 96
"""Height and width of an image in pixels."""
PATCH_SIZE: Final = 8
"""Height and width of a patch in pixels."""
GRID_SIZE: Final = IMAGE_SIZE // PATCH_SIZE
"""Patches along one side."""

QUESTION_TYPES: Final = (
    "color",
    "shape",
    "count",
    "exist",
    "rel",
    "where",
    "digit",
    "background",
)
"""Types asked in an evaluation."""
TRAINING_TYPES: Final = (*QUESTION_TYPES, "row", "column")
"""Types asked in training: the evaluated ones, and two that teach finer positions."""

PATCH_LABELS: Final = 1 + len(SHAPES) * len(COLORS) + 10
"""Number of patch labels: background, every shape in every colour, every digit."""

SPLIT_CODES: Final[dict[Split, int]] = {"train": 0, "test": 1}
COLOR_VALUES: Final = {
    "red": (220, 40, 40),
    "green": (40, 190, 60),
    "blue": (50, 80, 230),
    "yellow": (235, 215, 40),
    "purple": (160, 50, 200),
    "cyan": (40, 205, 215),
}
_DIGIT_VALUE: Final = (245, 245, 245)
_DIGIT_LABEL: Final = 1 + len(SHAPES) * len(COLORS)
_BAND_SIZE: Final = 16
_OBJECTS: Final = (2, 4)
_SHAPE_RADII: Final = (5, 10)
_DIGIT_RADII: Final = (7, 9)
NOISE: Final = (2.0, 8.0)
_RELATION_MARGIN: Final = 10
_QUADRANT_MARGIN: Final = 6
_BAND_MARGIN: Final = 2


@dataclass(frozen=True)
class SceneObject:
    """One object of a scene; positions and sizes are in pixels.

    Attributes:
        shape: One of `SHAPES`, or ``"digit"``.
        color: One of `COLORS`; ``"white"`` for a digit.
        x: Column of the centre.
        y: Row of the centre.
        radius: Half the side of the bounding square.
        digit: The digit's value, None for a shape.
    """

    shape: str
    color: str
    x: int
    y: int
    radius: int
    digit: int | None = None


@dataclass(frozen=True)
class Scene:
    """A rendered image with its ground truth.

    Attributes:
        image: RGB pixels, uint8 ``(96, 96, 3)``.
        objects: The objects that questions may ask about; they do not overlap.
        background: One of `BACKGROUNDS`.
        patch_labels: For each patch in row-major order 0 for background, else the label of the
            object that covers it: int64 ``(144,)``, below `PATCH_LABELS`.
        key: The ``(seed, split code, index)`` that the scene was generated from.
    """

    image: NDArray[np.uint8]
    objects: tuple[SceneObject, ...]
    background: str
    patch_labels: NDArray[np.int64]
    key: tuple[int, int, int]


@dataclass(frozen=True)
class Question:
    """A question about a scene whose answer is one word of the vocabulary."""

    type: str
    text: str
    answer: str


def draw_questions(
    rng: np.random.Generator,
    count: int,
    types: Sequence[str] | Mapping[str, float],
    draft: Callable[[str], tuple[str, str] | None],
) -> list[Question]:
    """Ask distinct questions, in the order in which their types are drawn.

    Args:
        rng: Draws the types.
        count: Number of questions wanted; there may be fewer.
        types: The types to take in turn, in a random order; or a mapping from type to the relative
            frequency with which it is drawn.
        draft: Makes text and answer of a question of a type, or None if there is nothing to ask.
    """
    names, attempts = list(types), 8 * count
    if isinstance(types, Mapping):
        weights = np.array([types[name] for name in names], float)
        drawn = rng.choice(len(names), attempts, p=weights / weights.sum())
    else:
        drawn = np.resize(rng.permutation(len(names)), attempts)
    asked: dict[str, Question] = {}
    for choice in drawn:
        made = draft(names[choice])
        if made is not None:
            question = Question(names[choice], *made)
            asked.setdefault(question.text, question)
        if len(asked) == count:
            break
    return list(asked.values())


class SceneGenerator:
    """Deterministic source of scenes and questions.

    Args:
        seed: Selects the sequence of scenes.
        split: ``"train"`` and ``"test"`` draw from disjoint handwritten digits and from disjoint
            random streams.

    Example:
        >>> generator = SceneGenerator(seed=7)
        >>> scene = generator.sample()
        >>> scene.image.shape
        (96, 96, 3)
        >>> len({question.text for question in generator.questions(scene)})
        8
    """

    def __init__(self, seed: int, split: Split = "test") -> None:
        if split not in SPLIT_CODES:
            raise ValueError(f"split must be one of {sorted(SPLIT_CODES)}, got {split!r}")
        self.seed = seed
        self.split: Split = split
        self._index = 0
        self._digits, self._digit_values = load_digits(split)

    def sample(self) -> Scene:
        """Return the next scene of the sequence."""
        scene = self.scene(self._index)
        self._index += 1
        return scene

    def scene(self, index: int) -> Scene:
        """Return the scene at a position of the sequence, whatever was sampled before."""
        key = (self.seed, SPLIT_CODES[self.split], index)
        rng = np.random.default_rng((*key, 0))
        image, background = draw_background(rng)
        draw_clutter(rng, image)
        owner = np.zeros((IMAGE_SIZE, IMAGE_SIZE), np.int64)
        objects = self._draw_objects(rng, image, owner)
        noise = rng.standard_normal(image.shape, dtype=np.float32)
        image += noise * np.float32(rng.uniform(*NOISE))
        return Scene(
            image=image.clip(0, 255).astype(np.uint8),
            objects=objects,
            background=background,
            patch_labels=_label_patches(owner),
            key=key,
        )

    def questions(
        self,
        scene: Scene,
        count: int = 8,
        types: Sequence[str] | Mapping[str, float] = QUESTION_TYPES,
    ) -> list[Question]:
        """Ask distinct questions about a scene.

        Args:
            scene: The scene to ask about.
            count: Number of questions wanted; a scene that has no more gives fewer.
            types: The types to take in turn, in a random order; or a mapping from type to the
                relative frequency with which it is drawn.

        Returns:
            Questions with different texts, the same ones for every call with equal arguments.
        """
        unknown = set(types) - set(TRAINING_TYPES)
        if unknown:
            raise ValueError(f"unknown question types {sorted(unknown)}, known: {TRAINING_TYPES}")
        rng = np.random.default_rng((*scene.key, 1))
        context = _Context.of(scene)
        return draw_questions(rng, count, types, lambda name: _ASK[name](context, rng))

    def _draw_objects(
        self, rng: np.random.Generator, image: NDArray[np.float32], owner: NDArray[np.int64]
    ) -> tuple[SceneObject, ...]:
        """Paint objects into `image` and their labels into `owner`, both changed in place."""
        number = int(rng.integers(_OBJECTS[0], _OBJECTS[1] + 1))
        shapes = [SHAPES[i] for i in rng.integers(0, len(SHAPES), number)]
        if rng.random() < 0.5:
            repeats = int(rng.integers(2, number + 1))
            shapes[:repeats] = shapes[:1] * repeats
        colors = [COLORS[i] for i in rng.integers(0, len(COLORS), number)]
        if rng.random() < 0.4:
            repeats = int(rng.integers(2, number + 1))
            colors[-repeats:] = colors[-1:] * repeats
        wanted = list(zip(shapes, colors, strict=True))
        if rng.random() < 0.7:
            wanted.insert(0, ("digit", "white"))
        occupied = np.zeros((IMAGE_SIZE, IMAGE_SIZE), bool)
        objects = []
        for shape, color in wanted:
            placed = _place(rng, occupied, _DIGIT_RADII if shape == "digit" else _SHAPE_RADII)
            if placed is None:
                continue
            x, y, radius = placed
            box = np.s_[y - radius : y + radius + 1, x - radius : x + radius + 1]
            value = np.zeros(3)
            if shape == "digit":
                sample = int(rng.integers(len(self._digit_values)))
                digit = int(self._digit_values[sample])
                coverage = _resize_digit(self._digits[sample], 2 * radius + 1)
                value += _DIGIT_VALUE
                label = _DIGIT_LABEL + digit
                objects.append(SceneObject(shape, color, x, y, radius, digit))
            else:
                coverage = shape_coverage(shape, radius)
                value += COLOR_VALUES[color] + rng.uniform(-15, 15, 3)
                label = 1 + SHAPES.index(shape) * len(COLORS) + COLORS.index(color)
                objects.append(SceneObject(shape, color, x, y, radius))
            alpha = coverage[..., None]
            image[box] = image[box] * (1 - alpha) + value.astype(np.float32) * alpha
            owner[box] = np.where(coverage > 0.3, label, owner[box])
        return tuple(objects)


@cache
def load_digits(split: Split) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Load the handwritten digits of a split.

    Returns:
        Ink coverage in 0..1, float32 ``(N, 8, 8)``, and the digits' values, int64 ``(N,)``.
    """
    with np.load(Path(__file__).parent / "data" / "digits.npz") as archive:
        chosen = archive["held_out"] == (split == "test")
        images = archive["images"][chosen].astype(np.float32) / 16
        values = archive["values"][chosen].astype(np.int64)
    return images, values


def draw_background(rng: np.random.Generator) -> tuple[NDArray[np.float32], str]:
    kind = BACKGROUNDS[rng.integers(len(BACKGROUNDS))]
    y, x = np.mgrid[0:IMAGE_SIZE, 0:IMAGE_SIZE].astype(np.float32)
    base = rng.uniform(70, 150) + rng.uniform(-18, 18, 3)
    amplitude = rng.uniform(10, 22)
    angle = rng.uniform(0, np.pi)
    period = rng.uniform(5, 10)
    phase = rng.uniform(0, period)
    slope_x, slope_y = rng.uniform(-25, 25, 2)
    match kind:
        case "stripes":
            distance = x * np.cos(angle) + y * np.sin(angle) + phase
            texture = np.sin(2 * np.pi * distance / period)
        case "checks":
            side = 0.7 * period
            cells = ((x + phase) // side).astype(int) + ((y + phase) // side).astype(int)
            texture = np.where(cells % 2 == 0, 1.0, -1.0)
        case "dots":
            pitch = 1.1 * period
            offset_x = (x + phase) % pitch - pitch / 2
            offset_y = (y + phase) % pitch - pitch / 2
            inside = offset_x**2 + offset_y**2 < (0.28 * pitch) ** 2
            texture = np.where(inside, 1.6, -0.4)
        case _:
            texture = np.zeros_like(x)
    slope = slope_x * (x / IMAGE_SIZE - 0.5) + slope_y * (y / IMAGE_SIZE - 0.5)
    return (base + (amplitude * texture + slope)[..., None]).astype(np.float32), kind


def draw_clutter(rng: np.random.Generator, image: NDArray[np.float32]) -> None:
    """Paint up to four grey bars: salient, and never asked about."""
    for _ in range(rng.integers(0, 5)):
        width, height = int(rng.integers(2, 4)), int(rng.integers(6, 14))
        if rng.random() < 0.5:
            width, height = height, width
        x, y = int(rng.integers(IMAGE_SIZE - width)), int(rng.integers(IMAGE_SIZE - height))
        image[y : y + height, x : x + width] = rng.uniform(20, 230)


def _place(
    rng: np.random.Generator, occupied: NDArray[np.bool_], radii: tuple[int, int]
) -> tuple[int, int, int] | None:
    """Find and reserve a free square; return its centre and radius, or None after 30 tries."""
    for _ in range(30):
        radius = int(rng.integers(radii[0], radii[1] + 1))
        x, y = (int(v) for v in rng.integers(radius + 1, IMAGE_SIZE - radius - 1, 2))
        reach = radius + 2
        if occupied[max(0, y - reach) : y + reach + 1, max(0, x - reach) : x + reach + 1].any():
            continue
        occupied[y - radius : y + radius + 1, x - radius : x + radius + 1] = True
        return x, y, radius
    return None


@cache
def shape_coverage(shape: str, radius: int) -> NDArray[np.float32]:
    """Fraction of each pixel that a shape covers, float32 ``(2 * radius + 1,) * 2``."""
    oversampling = 4
    side = (2 * radius + 1) * oversampling
    extent = radius * oversampling
    centre = side / 2 - 0.5
    y, x = np.mgrid[0:side, 0:side] - centre
    match shape:
        case "circle":
            mask = x**2 + y**2 <= extent**2
        case "ring":
            mask = (x**2 + y**2 <= extent**2) & (x**2 + y**2 >= (0.55 * extent) ** 2)
        case "square":
            mask = (abs(x) <= 0.85 * extent) & (abs(y) <= 0.85 * extent)
        case "cross":
            mask = (abs(x) <= 0.3 * extent) & (abs(y) <= extent)
            mask |= (abs(y) <= 0.3 * extent) & (abs(x) <= extent)
        case "triangle":
            corners = np.array([(0, -1), (0.95, 0.8), (-0.95, 0.8)]) * extent
            mask = _polygon(x, y, corners)
        case _:
            turn = np.arange(10) * np.pi / 5
            reach = np.where(np.arange(10) % 2 == 0, 1, 0.42) * extent
            mask = _polygon(x, y, np.stack([reach * np.sin(turn), -reach * np.cos(turn)], 1))
    cells = mask.reshape(2 * radius + 1, oversampling, 2 * radius + 1, oversampling)
    coverage: NDArray[np.float32] = cells.mean((1, 3)).astype(np.float32)
    return coverage


def _polygon(
    x: NDArray[np.float64], y: NDArray[np.float64], corners: NDArray[np.float64]
) -> NDArray[np.bool_]:
    """Mask of the points inside a polygon, by the even-odd rule."""
    inside = np.zeros(x.shape, bool)
    for (x0, y0), (x1, y1) in zip(corners, np.roll(corners, 1, axis=0), strict=True):
        if y0 != y1:
            crosses = (y0 > y) != (y1 > y)
            inside ^= crosses & (x < (x1 - x0) * (y - y0) / (y1 - y0) + x0)
    return inside


def _resize_digit(ink: NDArray[np.float32], side: int) -> NDArray[np.float32]:
    """Resize an ``(8, 8)`` digit bilinearly to ``(side, side)``."""
    at = np.linspace(0, 7, side, dtype=np.float32)
    low = np.floor(at).astype(int).clip(0, 6)
    part = at - low
    rows = ink[low] * (1 - part)[:, None] + ink[low + 1] * part[:, None]
    resized: NDArray[np.float32] = rows[:, low] * (1 - part) + rows[:, low + 1] * part
    return resized


def _label_patches(owner: NDArray[np.int64]) -> NDArray[np.int64]:
    cells = owner.reshape(GRID_SIZE, PATCH_SIZE, GRID_SIZE, PATCH_SIZE)
    pixels = cells.transpose(0, 2, 1, 3).reshape(GRID_SIZE**2, PATCH_SIZE**2)
    covered = (pixels > 0).sum(1) >= 5
    return np.where(covered, pixels.max(1), 0)


@dataclass(frozen=True)
class _Context:
    """A scene's objects grouped the way the questions need them."""

    scene: Scene
    shapes: tuple[SceneObject, ...]
    unique_shapes: tuple[SceneObject, ...]
    unique_colors: tuple[SceneObject, ...]

    @classmethod
    def of(cls, scene: Scene) -> "_Context":
        shapes = tuple(item for item in scene.objects if item.digit is None)
        names = [item.shape for item in shapes]
        colors = [item.color for item in shapes]
        return cls(
            scene,
            shapes,
            tuple(item for item in shapes if names.count(item.shape) == 1),
            tuple(item for item in shapes if colors.count(item.color) == 1),
        )


_Draft = tuple[str, str] | None
_T = TypeVar("_T")


def pick(rng: np.random.Generator, items: Sequence[_T]) -> _T:
    return items[int(rng.integers(len(items)))]


def _ask_color(context: _Context, rng: np.random.Generator) -> _Draft:
    if not context.unique_shapes:
        return None
    item = pick(rng, context.unique_shapes)
    return f"what color is the {item.shape} ?", item.color


def _ask_shape(context: _Context, rng: np.random.Generator) -> _Draft:
    if not context.unique_colors:
        return None
    item = pick(rng, context.unique_colors)
    return f"what shape is {item.color} ?", item.shape


def _ask_count(context: _Context, rng: np.random.Generator) -> _Draft:
    number = int(rng.integers(0, _OBJECTS[1] + 1))
    # The number is drawn first, or most answers would be zero.
    if rng.random() < 0.5:
        present = [item.shape for item in context.shapes]
        names = [PLURALS[name] for name in SHAPES if present.count(name) == number]
    else:
        present = [item.color for item in context.shapes]
        names = [f"{name} things" for name in COLORS if present.count(name) == number]
    return (f"how many {pick(rng, names)} are there ?", str(number)) if names else None


def _ask_exist(context: _Context, rng: np.random.Generator) -> _Draft:
    if not context.shapes:
        return None
    present = {(item.shape, item.color) for item in context.shapes}
    if rng.random() < 0.5:
        shape, color = pick(rng, sorted(present))
        return f"is there a {color} {shape} ?", "yes"
    # A shape and a colour that are both in the scene, but not together, are the hard negatives.
    for _ in range(10):
        if rng.random() < 0.75:
            shape, color = pick(rng, context.shapes).shape, pick(rng, context.shapes).color
        else:
            shape, color = pick(rng, SHAPES), pick(rng, COLORS)
        if (shape, color) not in present:
            return f"is there a {color} {shape} ?", "no"
    return None


def _ask_relation(context: _Context, rng: np.random.Generator) -> _Draft:
    if len(context.unique_shapes) < 2:
        return None
    order = rng.permutation(len(context.unique_shapes))
    first, second = (context.unique_shapes[i] for i in order[:2])
    relation = int(rng.integers(len(RELATIONS)))
    right, down = second.x - first.x, second.y - first.y
    signed = (right, -right, down, -down)[relation]
    if abs(signed) < _RELATION_MARGIN:
        return None
    answer = "yes" if signed > 0 else "no"
    return f"is the {first.shape} {RELATIONS[relation]} the {second.shape} ?", answer


def _ask_where(context: _Context, rng: np.random.Generator) -> _Draft:
    half = IMAGE_SIZE / 2
    clear = [
        item
        for item in context.unique_shapes
        if min(abs(item.x - half), abs(item.y - half)) >= _QUADRANT_MARGIN
    ]
    if not clear:
        return None
    item = pick(rng, clear)
    return f"where is the {item.shape} ?", QUADRANTS[2 * (item.y > half) + (item.x > half)]


def _ask_digit(context: _Context, rng: np.random.Generator) -> _Draft:
    values = [item.digit for item in context.scene.objects if item.digit is not None]
    return ("what digit is shown ?", str(values[0])) if values else None


def _ask_background(context: _Context, rng: np.random.Generator) -> _Draft:
    return "what is the background ?", context.scene.background


def _ask_row(context: _Context, rng: np.random.Generator) -> _Draft:
    return _ask_band(context, rng, "row")


def _ask_column(context: _Context, rng: np.random.Generator) -> _Draft:
    return _ask_band(context, rng, "column")


def _ask_band(context: _Context, rng: np.random.Generator, word: str) -> _Draft:
    if not context.unique_shapes:
        return None
    item = pick(rng, context.unique_shapes)
    band, rest = divmod(item.y if word == "row" else item.x, _BAND_SIZE)
    if not _BAND_MARGIN <= rest < _BAND_SIZE - _BAND_MARGIN:
        return None
    return f"what {word} is the {item.shape} ?", str(band)


_ASK: Final[dict[str, Callable[[_Context, np.random.Generator], _Draft]]] = {
    "color": _ask_color,
    "shape": _ask_shape,
    "count": _ask_count,
    "exist": _ask_exist,
    "rel": _ask_relation,
    "where": _ask_where,
    "digit": _ask_digit,
    "background": _ask_background,
    "row": _ask_row,
    "column": _ask_column,
}
