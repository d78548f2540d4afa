"""What each model is trained with: stages of a fixed number of steps."""

from collections.abc import Mapping
from dataclasses import dataclass, field

MIX = {
    "color": 0.08,
    "shape": 0.08,
    "count": 0.2,
    "exist": 0.12,
    "rel": 0.2,
    "where": 0.1,
    "digit": 0.08,
    "background": 0.04,
    "row": 0.05,
    "column": 0.05,
}


HARD_MIX = {
    "color": 0.05,
    "shape": 0.06,
    "count": 0.22,
    "exist": 0.1,
    "rel": 0.27,
    "where": 0.08,
    "digit": 0.09,
    "background": 0.03,
    "row": 0.05,
    "column": 0.05,
}

RELATION_MIX = {
    "color": 0.04,
    "shape": 0.04,
    "count": 0.16,
    "exist": 0.1,
    "rel": 0.42,
    "where": 0.05,
    "digit": 0.1,
    "background": 0.03,
    "row": 0.03,
    "column": 0.03,
}


@dataclass(frozen=True)
class Stage:
    """A part of a training run with its own optimiser and learning rate schedule.

    Attributes:
        name: Name in the log.
        steps: Optimiser steps.
        batch_size: Images a step.
        learning_rate: Peak learning rate.
        losses: Weight of each loss; without ``"answers"`` only the vision tower is trained.
        types: Relative frequency of the question types.
        plateau: Fraction of the horizon at the peak learning rate, before the cosine decay.
        horizon: Step at which the decay ends; the number of steps if None.
        varied_density: Whether the language model sees scenes with a random part of the visual
            tokens missing, see `visible_tokens`.
    """

    name: str
    steps: int
    batch_size: int
    learning_rate: float
    losses: Mapping[str, float]
    types: Mapping[str, float] = field(default_factory=lambda: MIX)
    plateau: float = 0.3
    horizon: int | None = None
    varied_density: bool = False


_LABELS = {"patch": 1.0, "tags": 1.0, "position": 0.1}
_CAPTIONS = {"queries": 1.0, "tags": 1.0, "position": 0.1, "pixels": 1.0}


def _with_answers(losses: Mapping[str, float], weight: float) -> dict[str, float]:
    """Learn to answer, and keep the vision losses with a lower weight."""
    kept = {name: value if name == "position" else weight * value for name, value in losses.items()}
    return {"answers": 2.0, **kept}


def _grounded(losses: Mapping[str, float], weight: float) -> dict[str, float]:
    """Also locate the objects that a question names, on which relations depend."""
    return {**_with_answers(losses, weight), "grounding": 2.0}


RECIPES: dict[str, tuple[Stage, ...]] = {
    "a": (
        Stage("vision", 2500, 24, 1.5e-3, _LABELS),
        Stage("joint", 1500, 40, 1.5e-3, _with_answers(_LABELS, 0.4), horizon=3000),
        Stage("grounded", 1900, 40, 1.2e-3, _grounded(_LABELS, 0.3), HARD_MIX, plateau=0.2),
        Stage("relations", 600, 40, 1e-3, _grounded(_LABELS, 0.2), RELATION_MIX, plateau=0.3),
        Stage(
            "densities",
            450,
            40,
            8e-4,
            _grounded(_LABELS, 0.2),
            HARD_MIX,
            plateau=0.2,
            varied_density=True,
        ),
    ),
    "b": (
        Stage("vision", 3500, 24, 1.5e-3, _CAPTIONS),
        Stage("joint", 1000, 40, 1.5e-3, _with_answers(_CAPTIONS, 0.4), horizon=3000),
        Stage("grounded", 2400, 40, 1.2e-3, _grounded(_CAPTIONS, 0.3), plateau=0.2),
        Stage(
            "densities",
            450,
            40,
            8e-4,
            _grounded(_CAPTIONS, 0.2),
            HARD_MIX,
            plateau=0.2,
            varied_density=True,
        ),
    ),
}


CLIP_MIX = {
    "moved": 0.18,
    "moving": 0.14,
    "direction": 0.22,
    "order": 0.2,
    "color": 0.06,
    "count": 0.12,
    "where": 0.05,
    "background": 0.03,
}


@dataclass(frozen=True)
class ClipStage:
    """A part of a training run on clips.

    Attributes:
        name: Name in the log.
        chunks: First chunk of a thousand clips, and the one after the last.
        passes: How often they are seen, with other questions each time.
        batch_size: Clips a step.
        learning_rate: Peak learning rate.
        tokens: Counts of visual tokens, one of which is drawn for each step.
        losses: Weight of each loss.
        types: Relative frequency of the question types.
        plateau: Fraction of the stage at the peak learning rate, before the cosine decay.
        horizon: Step at which the decay ends; the number of steps if None.
    """

    name: str
    chunks: tuple[int, int]
    passes: int
    batch_size: int
    learning_rate: float
    tokens: tuple[int, ...]
    losses: Mapping[str, float]
    types: Mapping[str, float] = field(default_factory=lambda: CLIP_MIX)
    plateau: float = 0.4
    horizon: int | None = None

    @property
    def steps(self) -> int:
        """Optimiser steps."""
        clips = 1000
        return self.passes * (self.chunks[1] - self.chunks[0]) * -(-clips // self.batch_size)


CLIP_ORDER_MIX = {
    "moved": 0.16,
    "moving": 0.1,
    "direction": 0.15,
    "order": 0.3,
    "color": 0.06,
    "count": 0.15,
    "where": 0.05,
    "background": 0.03,
}

_MOTION = {"answers": 1.0, "motions": 1.0, "kinds": 0.3, "word_motions": 0.5, "word_centres": 1.0}
_DENSITIES = (18, 36, 72, 144, 288)

VIDEO_RECIPE = (
    ClipStage("motion", (0, 8), 2, 40, 1.2e-3, (72,), _MOTION, plateau=0.9),
    ClipStage("densities", (0, 24), 1, 40, 1.2e-3, _DENSITIES, _MOTION, plateau=0.3, horizon=3000),
    ClipStage(
        "order",
        (0, 24),
        3,
        40,
        1.2e-3,
        _DENSITIES,
        {**_MOTION, "times": 1.0},
        CLIP_ORDER_MIX,
        plateau=0.3,
    ),
)
