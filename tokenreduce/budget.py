"""How many tokens to keep: one parser and one rounding rule for every strategy."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from numbers import Integral, Rational, Real

from tokenreduce.errors import BudgetError

#: Budgets that say what an item may cost; what a token costs depends on the model.
COSTS = ("flops", "prefill_ms")


@dataclass(frozen=True, kw_only=True)
class Budget:
    """A token budget for one visual item (an image with its tiles, or a clip).

    Exactly one of ``keep``, ``keep_ratio`` and ``reduction`` states the budget of an item;
    ``total`` caps the sum over the items of one prompt and may stand alone ("reduce only to fit").
    Protected tokens stand outside the budget.

    ``flops`` and ``prefill_ms`` state what the LLM may spend on an item in place of a count; what
    a count costs depends on the model, so :meth:`solve` turns them into ``keep`` once it is known.

    Rounding is done once, in integers: the ratio is read as the decimal that the user typed
    (``0.1`` is one tenth), multiplied by the number of tokens, and rounded half up, to at least
    one token.

    Args:
        keep: number of tokens to keep; 0 is legal only inside the LLM (decoder site).
        keep_ratio: share of the tokens to keep, in (0, 1].
        reduction: how many times fewer tokens, at least 1; ``reduction=16`` keeps one in 16.
        total: most tokens that all items of one prompt may keep together.
        flops: most FLOPs that the layers of the LLM may spend on the tokens of an item.
        prefill_ms: most milliseconds that they may take.

    Raises:
        BudgetError: if several budgets of an item are given, none at all is, or a value is out of
            range.
    """

    keep: int | None = None
    keep_ratio: float | Fraction | None = None
    reduction: float | Fraction | None = None
    total: int | None = None
    flops: float | None = None
    prefill_ms: float | None = None

    def __post_init__(self) -> None:
        for name in ("keep", "total"):
            value = getattr(self, name)
            if isinstance(value, Integral) and not isinstance(value, bool):
                # A fixed-width integer of NumPy would overflow further on.
                object.__setattr__(self, name, int(value))
        given = {
            name: value
            for name in ("keep", "keep_ratio", "reduction", *COSTS)
            if (value := getattr(self, name)) is not None
        }
        if len(given) > 1:
            stated = " and ".join(f"{name}={value}" for name, value in given.items())
            raise BudgetError(f"two budgets at once: {stated}. Give exactly one of them.")
        if not given and self.total is None:
            raise BudgetError(
                "no budget: give exactly one of keep=64, keep_ratio=0.0625 or reduction=16."
            )
        for name in ("keep", "total"):
            value = getattr(self, name)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, Integral):
                raise BudgetError(f"{name} must be a whole number of tokens, got {value!r}.")
            if value < (0 if name == "keep" else 1):
                raise BudgetError(f"{name}={value} is out of range: it counts tokens.")
        for name in COSTS:
            value = getattr(self, name)
            if value is not None and not (as_fraction(name, value) > 0):
                raise BudgetError(f"{name}={value} is out of range: more than nothing.")
        if self.total is not None and any(getattr(self, name) is not None for name in COSTS):
            raise BudgetError(
                "two budgets at once: total counts the tokens of a prompt, flops and prefill_ms "
                "what one item may cost. Give one of them."
            )
        ratio = self._ratio
        if ratio is not None and not 0 < ratio <= 1:
            stated = " ".join(f"{name}={value}" for name, value in given.items())
            raise BudgetError(
                f"{stated} is out of range: keep_ratio lies in (0, 1], reduction is at least 1."
            )

    @cached_property
    def _ratio(self) -> Fraction | None:
        if self.keep_ratio is not None:
            return as_fraction("keep_ratio", self.keep_ratio)
        if self.reduction is not None:
            reduction = as_fraction("reduction", self.reduction)
            if reduction <= 0:
                raise BudgetError(f"reduction={self.reduction} is out of range: at least 1.")
            return 1 / reduction
        return None

    def count(self, tokens: int) -> int:
        """Tokens to keep of ``tokens`` unprotected ones, never more than there are."""
        for name in COSTS:
            if getattr(self, name) is not None:
                raise BudgetError(
                    f"{name}={getattr(self, name)}: what a token costs depends on the model. "
                    "Attach the stage to one, or solve the budget first."
                )
        if self.keep is not None:
            return min(self.keep, tokens)
        if self._ratio is None:
            return tokens
        exact = self._ratio * tokens
        rounded = (2 * exact.numerator + exact.denominator) // (2 * exact.denominator)
        return min(tokens, max(1, rounded))

    def solve(self, tokens: int, cost: Callable[[int], float]) -> "Budget":
        """This budget with ``flops`` or ``prefill_ms`` turned into a count.

        Args:
            tokens: how many there are.
            cost: what keeping a number of tokens costs, in the unit of the budget; never less for
                more tokens.

        Raises:
            BudgetError: if one token costs too much already.
        """
        name = next((name for name in COSTS if getattr(self, name) is not None), None)
        if name is None or tokens == 0:
            return self if name is None else Budget(keep=0)
        limit = getattr(self, name)
        if cost(1) > limit:
            raise BudgetError(
                f"{name}={limit}: one token costs {cost(1):.4g} already. Allow more, or cut at an "
                "earlier layer."
            )
        low, high = 1, tokens
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if cost(middle) <= limit else (low, middle - 1)
        return Budget(keep=low)

    def shares(self, tokens: Sequence[int]) -> list[int]:
        """Tokens to keep of each item of one prompt, so that ``total`` holds over all of them.

        Items keep :meth:`count` of their own tokens; if the sum exceeds ``total``, every item
        gives way in proportion (largest remainder, ties to the first item, at least one each).

        Args:
            tokens: unprotected tokens of each item.

        Raises:
            BudgetError: if ``total`` is smaller than the number of items that have tokens.
        """
        counts = [self.count(n) for n in tokens]
        if self.total is None or sum(counts) <= self.total:
            return counts
        holders = [index for index, count in enumerate(counts) if count > 0]
        if self.total < len(holders):
            raise BudgetError(
                f"total={self.total} is less than one token for each of the {len(holders)} visual "
                "items of this prompt. Raise total, or give fewer images."
            )
        # One token each is set aside first, so that no item vanishes from the prompt.
        spare, weight = self.total - len(holders), sum(counts) - len(holders)
        exact = {i: Fraction(spare * (counts[i] - 1), weight) for i in holders}
        shares = [0] * len(counts)
        for i in holders:
            shares[i] = 1 + exact[i].numerator // exact[i].denominator
        by_remainder = sorted(holders, key=lambda i: (-(exact[i] % 1), i))
        for i in by_remainder[: self.total - sum(shares)]:
            shares[i] += 1
        return shares

    def __str__(self) -> str:
        return ", ".join(
            f"{name}={value}"
            for name in ("keep", "keep_ratio", "reduction", "total", *COSTS)
            if (value := getattr(self, name)) is not None
        )


def as_fraction(name: str, value: object) -> Fraction:
    """Read a ratio as the decimal its user typed: 0.1 is one tenth, not the nearest double."""
    if isinstance(value, Rational) and not isinstance(value, bool):
        return Fraction(int(value.numerator), int(value.denominator))
    if isinstance(value, Real) and not isinstance(value, bool):
        try:
            return Fraction(repr(float(value)))
        except ValueError:
            pass
    raise BudgetError(f"{name} must be a finite number, got {value!r}.")
