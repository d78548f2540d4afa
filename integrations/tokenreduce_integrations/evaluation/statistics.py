"""Accuracies with intervals, and paired tests.

The score is the macro average: accuracy by question type, averaged over the types. Questions about
one picture are not independent, so that intervals come from a bootstrap that resamples whole
pictures, and differences are tested by swapping whole pictures between two runs. Where every
question has a picture of its own, McNemar's exact test is used instead.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from tokenreduce_integrations.evaluation.schema import Estimate

RESAMPLES: Final = 2000
"""Bootstrap resamples."""
FLIPS: Final = 99_999
"""Permutations of a sign-flip test: with so many, some hundred tests can be corrected for."""
CONFIDENCE: Final = 0.95
"""Coverage of an interval."""

_CHUNK: Final = 8192

Correct = NDArray[np.bool_]
"""``(Q,)``: which answers are right."""


class Bootstrap:
    """Macro accuracies and their differences, with intervals from resampled pictures.

    Every estimate uses the same resamples, so that intervals of differences are paired.

    Args:
        groups: the picture of each question.
        kinds: the type of each question.
        resamples: how many, at least 1.
        seed: of the resamples.
    """

    def __init__(
        self,
        groups: Sequence[object],
        kinds: Sequence[str],
        *,
        resamples: int = RESAMPLES,
        seed: int = 0,
    ) -> None:
        self.kinds = tuple(dict.fromkeys(kinds))
        of_group = {name: index for index, name in enumerate(dict.fromkeys(groups))}
        of_kind = {name: index for index, name in enumerate(self.kinds)}
        self._cells = (
            np.array([of_group[name] for name in groups], int),
            np.array([of_kind[name] for name in kinds], int),
        )
        self._shape = len(of_group), len(of_kind)
        #: Whether every question has its own picture.
        self.independent = len(of_group) == len(groups)
        self._asked = self._sums(np.ones(len(groups)))
        rng = np.random.default_rng(seed)
        even = np.full(len(of_group), 1 / len(of_group))
        self._weights = rng.multinomial(len(of_group), even, size=resamples).astype(float)

    def by_type(self, correct: Correct) -> dict[str, float]:
        """Accuracy by question type."""
        accuracy = self._sums(correct).sum(0) / self._asked.sum(0)
        return dict(zip(self.kinds, accuracy.tolist(), strict=True))

    def macro(self, correct: Correct) -> Estimate:
        """Mean over question types of the accuracy."""
        return _estimate(*self._macros(correct))

    def micro(self, correct: Correct) -> Estimate:
        """Accuracy over all questions."""
        right, asked = self._sums(correct).sum(1), self._asked.sum(1)
        values = (self._weights @ right) / (self._weights @ asked)
        return _estimate(float(np.mean(correct)), values)

    def difference(self, correct: Correct, other: Correct) -> Estimate:
        """Macro accuracy of the first minus that of the second, on the same questions."""
        (value, values), (base, bases) = self._macros(correct), self._macros(other)
        return _estimate(value - base, values - bases)

    def share(self, correct: Correct, unreduced: Correct) -> Estimate:
        """Macro accuracy as a share of the unreduced one; 0 where that is 0."""
        (value, values), (base, bases) = self._macros(correct), self._macros(unreduced)
        if base == 0:
            return Estimate(value=0.0, low=0.0, high=0.0)
        return _estimate(value / base, values / bases)

    def differences(self, correct: Correct, other: Correct) -> NDArray[np.float64]:
        """``(groups,)`` what each picture adds to the difference of the macro accuracies."""
        weight = 1 / (self._asked.sum(0) * len(self.kinds))
        return np.asarray(self._sums(correct.astype(float) - other) @ weight)

    def _sums(self, values: NDArray[np.bool_] | NDArray[np.float64]) -> NDArray[np.float64]:
        """``(groups, kinds)`` sums over the questions of each picture and type."""
        sums = np.zeros(self._shape)
        np.add.at(sums, self._cells, values)
        return sums

    def _macros(self, correct: Correct) -> tuple[float, NDArray[np.float64]]:
        right = self._sums(correct)
        whole = _macro(right.sum(0)[None], self._asked.sum(0)[None])
        return float(whole[0]), _macro(self._weights @ right, self._weights @ self._asked)


def mcnemar(wins: int, losses: int) -> float:
    """Two-sided exact McNemar test.

    Args:
        wins: questions that only the first run answers right.
        losses: questions that only the second run answers right.
    """
    discordant = wins + losses
    tail = sum(math.comb(discordant, k) for k in range(min(wins, losses) + 1))
    return min(1.0, float(2 * tail / 2**discordant))


def sign_flips(
    differences: NDArray[np.float64], *, flips: int = FLIPS, seed: int = 0
) -> NDArray[np.float64]:
    """Two-sided permutation tests of paired differences, all with the same permutations.

    Under the hypothesis that two runs do not differ, each picture's answers may be swapped between
    them, which flips the sign of what it adds to the difference.

    Args:
        differences: ``(tests, groups)``.
        flips: how many permutations are drawn; the observed one is counted beside them.
        seed: of the permutations.

    Returns:
        ``(tests,)`` p-values.
    """
    groups = differences.shape[1]
    observed = np.abs(differences.sum(1))
    # Sums of equal values in another order differ in the last bits.
    least = observed - 1e-9
    extreme = np.ones(len(differences))
    rng = np.random.default_rng(seed)
    for start in range(0, flips, _CHUNK):
        count = min(_CHUNK, flips - start)
        signs = 1.0 - 2.0 * rng.integers(0, 2, size=(count, groups))
        extreme += (np.abs(signs @ differences.T) >= least).sum(0)
    return np.asarray(extreme / (flips + 1))


def holm(values: Sequence[float]) -> list[float]:
    """P-values corrected for their number, by Holm's step-down method."""
    order = sorted(range(len(values)), key=lambda index: values[index])
    corrected, highest = [0.0] * len(values), 0.0
    for rank, index in enumerate(order):
        highest = max(highest, min(1.0, (len(values) - rank) * values[index]))
        corrected[index] = highest
    return corrected


def _estimate(value: float, values: NDArray[np.float64]) -> Estimate:
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(values, [tail, 1 - tail])
    return Estimate(value=value, low=float(low), high=float(high))


def _macro(right: NDArray[np.float64], asked: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean over the types that occur; a small resample can miss a rare one."""
    occurs = asked > 0
    accuracy = np.divide(right, asked, out=np.zeros_like(right), where=occurs)
    return np.asarray(accuracy.sum(1) / occurs.sum(1))
