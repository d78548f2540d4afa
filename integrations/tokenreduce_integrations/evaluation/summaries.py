"""Figures of the rows of one evaluation."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from tokenreduce_integrations.evaluation.schema import PARTS, Estimate, Kind, Row, TokenCounts
from tokenreduce_integrations.evaluation.statistics import Bootstrap, Correct


@dataclass(frozen=True, kw_only=True)
class Summary:
    """Figures of one evaluation.

    Attributes:
        samples: questions.
        groups: pictures or clips.
        accuracy: mean over question types of the accuracy.
        micro: accuracy over all questions.
        kinds: by question type.
        tokens: realised tokens.
        seconds: of a question, by part.
    """

    samples: int
    groups: int
    accuracy: Estimate
    micro: Estimate
    kinds: dict[str, Kind]
    tokens: TokenCounts
    seconds: dict[str, float]

    def as_dict(self) -> dict[str, Any]:
        """The figures as plain data."""
        return asdict(self)

    def lines(self) -> list[tuple[str, str]]:
        """The figures as a table of two columns."""
        tokens = self.tokens
        kinds = [
            (f"  {name or 'other'} ({kind.questions})", f"{100 * kind.accuracy:.1f} %")
            for name, kind in self.kinds.items()
        ]
        return [
            ("questions", f"{self.samples:,} about {self.groups:,} pictures"),
            ("accuracy, mean over types", percent(self.accuracy)),
            *(kinds if len(kinds) > 1 else ()),
            ("accuracy, all questions", percent(self.micro)),
            ("visual tokens", f"{tokens.tokens_in:.1f} -> {tokens.tokens_out:.1f}"),
            ("visual tokens, layer average", f"{tokens.layer_average:.1f}"),
            *((f"{part}, ms a question", f"{1000 * self.seconds[part]:.2f}") for part in PARTS),
        ]


def summary_of(rows: Sequence[Row]) -> Summary:
    """The figures of rows, with intervals.

    Args:
        rows: at least one.
    """
    bootstrap = bootstrap_of(rows)
    correct = correct_of(rows)
    return Summary(
        samples=len(rows),
        groups=len({row.group for row in rows}),
        accuracy=bootstrap.macro(correct),
        micro=bootstrap.micro(correct),
        kinds=kinds_of(rows, bootstrap),
        tokens=token_counts(rows),
        seconds={part: statistics.fmean(row.seconds[part] for row in rows) for part in PARTS},
    )


def bootstrap_of(rows: Sequence[Row], *, seed: int = 0) -> Bootstrap:
    """The statistics of answers to the questions of these rows."""
    return Bootstrap([row.group for row in rows], [row.kind for row in rows], seed=seed)


def correct_of(rows: Sequence[Row]) -> Correct:
    """Which answers are right."""
    return np.array([row.correct for row in rows], bool)


def kinds_of(rows: Sequence[Row], bootstrap: Bootstrap) -> dict[str, Kind]:
    """Accuracy by question type."""
    asked = Counter(row.kind for row in rows)
    accuracy = bootstrap.by_type(correct_of(rows))
    return {name: Kind(accuracy=accuracy[name], questions=asked[name]) for name in accuracy}


def token_counts(rows: Sequence[Row]) -> TokenCounts:
    """Realised tokens, from the receipts."""
    left = [row.receipt["tokens_out"] for row in rows]
    layers = [row.receipt["tokens_per_layer"] for row in rows]
    return TokenCounts(
        tokens_in=statistics.fmean(row.receipt["tokens_in"] for row in rows),
        tokens_out=statistics.fmean(left),
        layer_average=statistics.fmean(sum(one) / max(1, len(one)) for one in layers),
        least=min(left),
        most=max(left),
    )


def percent(estimate: Estimate) -> str:
    """A share with its interval, in percent."""
    value, low, high = (100 * x for x in (estimate.value, estimate.low, estimate.high))
    return f"{value:.1f} % [{low:.1f}, {high:.1f}]"
