"""Words of the testbed language and their token ids (one word is one token)."""

from typing import Final

SHAPES: Final = ("circle", "square", "triangle", "star", "cross", "ring")
PLURALS: Final = {
    "circle": "circles",
    "square": "squares",
    "triangle": "triangles",
    "star": "stars",
    "cross": "crosses",
    "ring": "rings",
}
COLORS: Final = ("red", "green", "blue", "yellow", "purple", "cyan")
DIGITS: Final = tuple("0123456789")
BACKGROUNDS: Final = ("plain", "stripes", "checks", "dots")
QUADRANTS: Final = ("topleft", "topright", "bottomleft", "bottomright")
RELATIONS: Final = ("left of", "right of", "above", "below")
DIRECTIONS: Final = ("left", "right", "up", "down")

PAD: Final = "<pad>"
BOS: Final = "<s>"
EOS: Final = "</s>"
UNKNOWN: Final = "<unk>"
IMAGE: Final = "<image>"
VIDEO: Final = "<video>"
USER: Final = "USER:"
ASSISTANT: Final = "ASSISTANT:"

SCENE_WORDS: Final[tuple[str, ...]] = (
    *(PAD, BOS, EOS, UNKNOWN, IMAGE, USER, ASSISTANT),
    *SHAPES,
    *PLURALS.values(),
    *COLORS,
    *DIGITS,
    *("yes", "no"),
    *QUADRANTS,
    *BACKGROUNDS,
    *("what", "color", "is", "the", "shape", "how", "many", "are", "there", "a", "where"),
    *("digit", "shown", "background", "left", "right", "of", "above", "below", "things", "?"),
    *("row", "column"),
)
"""The words of the models that see pictures, in the order of their token ids."""

WORDS: Final[tuple[str, ...]] = (
    *SCENE_WORDS,
    *(VIDEO, "moved", "move", "did", "first", "last", "up", "down"),
)
"""Every word, in the order of its token id; those beyond `SCENE_WORDS` are about clips."""

TOKEN_IDS: Final[dict[str, int]] = {word: index for index, word in enumerate(WORDS)}
"""Token id of each word."""


def encode(text: str) -> list[int]:
    """Token ids of a text whose words are separated by spaces, without special tokens."""
    unknown = TOKEN_IDS[UNKNOWN]
    return [TOKEN_IDS.get(word, unknown) for word in text.split()]


def encode_turn(question: str) -> list[int]:
    """Token ids of one user turn up to the point where the model starts its answer."""
    return encode(f"{USER} {question} {ASSISTANT}")
