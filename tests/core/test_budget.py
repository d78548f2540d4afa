from decimal import ROUND_HALF_UP, Decimal
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenreduce.budget import Budget
from tokenreduce.errors import BudgetError

tokens = st.integers(0, 10**6)


@st.composite
def budgets(draw: Any) -> Budget:
    kind = draw(st.sampled_from(["keep", "keep_ratio", "reduction"]))
    value = draw(
        {
            "keep": st.integers(0, 10**6),
            "keep_ratio": st.floats(1e-9, 1.0) | st.fractions(Fraction(1, 10**6), 1),
            "reduction": st.floats(1.0, 1e9) | st.fractions(1, 10**6) | st.integers(1, 10**6),
        }[kind]
    )
    return Budget(**{kind: value})


@given(budgets(), tokens)
def test_never_more_than_there_are_and_never_none_by_ratio(budget: Budget, n: int) -> None:
    count = budget.count(n)
    assert 0 <= count <= n
    if budget.keep is None and n:
        assert count >= 1


@given(st.integers(0, 10**6), tokens)
def test_keep_is_taken_at_its_word(keep: int, n: int) -> None:
    assert Budget(keep=keep).count(n) == min(keep, n)


@given(budgets(), tokens, tokens)
def test_more_tokens_never_keep_fewer(budget: Budget, n: int, m: int) -> None:
    few, many = sorted((n, m))
    assert budget.count(few) <= budget.count(many)


@given(st.decimals("0.001", 1, places=3), tokens.filter(bool))
def test_a_ratio_is_the_decimal_that_was_typed(ratio: Decimal, n: int) -> None:
    """The oracle is decimal arithmetic on what the user sees."""
    exact = (ratio * n).quantize(Decimal(1), ROUND_HALF_UP)
    assert Budget(keep_ratio=float(ratio)).count(n) == max(1, int(exact))


@given(st.integers(1, 10**4), tokens.filter(bool))
def test_a_whole_reduction_divides_half_up(reduction: int, n: int) -> None:
    expected = max(1, (2 * n + reduction) // (2 * reduction))
    assert Budget(reduction=reduction).count(n) == min(n, expected)
    assert Budget(reduction=float(reduction)).count(n) == min(n, expected)
    assert Budget(keep_ratio=Fraction(1, reduction)).count(n) == min(n, expected)


@pytest.mark.parametrize(
    ("budget", "n", "kept"),
    [
        ({"keep_ratio": 0.1}, 5, 1),
        ({"keep_ratio": 0.1}, 15, 2),
        ({"keep_ratio": 0.1}, 25, 3),
        ({"keep_ratio": 0.3}, 5, 2),
        ({"reduction": 16}, 576, 36),
        ({"reduction": 2.5}, 10, 4),
        ({"keep": 64}, 10, 10),
        ({"keep": 0}, 10, 0),
        ({"total": 7}, 100, 100),
        ({"keep_ratio": 1}, 9, 9),
        ({"keep_ratio": 1e-9}, 9, 1),
    ],
)
def test_known_counts(budget: dict[str, Any], n: int, kept: int) -> None:
    assert Budget(**budget).count(n) == kept


@given(budgets(), st.lists(st.integers(0, 5000), max_size=8), st.integers(1, 20000))
def test_shares_hold_the_total(budget: Budget, items: list[int], total: int) -> None:
    shared = Budget(
        keep=budget.keep, keep_ratio=budget.keep_ratio, reduction=budget.reduction, total=total
    )
    alone = [budget.count(n) for n in items]
    holders = sum(count > 0 for count in alone)
    if sum(alone) > total and total < holders:
        with pytest.raises(BudgetError, match=f"total={total}"):
            shared.shares(items)
        return
    shares = shared.shares(items)
    assert len(shares) == len(items)
    assert sum(shares) == min(sum(alone), total)
    assert all(share <= count for share, count in zip(shares, alone, strict=True))
    assert all(share >= 1 for share, count in zip(shares, alone, strict=True) if count)


@given(st.integers(1, 500), st.integers(1, 6), st.integers(0, 3000))
def test_equal_items_get_equal_shares_but_for_the_remainder(n: int, items: int, extra: int) -> None:
    shares = Budget(total=items + extra).shares([n] * items)
    assert max(shares) - min(shares) <= 1
    assert shares == sorted(shares, reverse=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "no budget"),
        ({"keep": 1, "keep_ratio": 0.5}, "two budgets at once: keep=1 and keep_ratio=0.5"),
        ({"keep": 1, "reduction": 2}, "two budgets"),
        ({"keep_ratio": 0.5, "reduction": 2}, "two budgets"),
        ({"keep": -1}, "keep=-1 is out of range"),
        ({"keep": 1.5}, "whole number"),
        ({"keep": True}, "whole number"),
        ({"keep": "8"}, "whole number"),
        ({"total": 0}, "total=0 is out of range"),
        ({"total": 2.0}, "whole number"),
        ({"keep_ratio": 0}, "out of range"),
        ({"keep_ratio": 0.0}, "out of range"),
        ({"keep_ratio": -0.5}, "out of range"),
        ({"keep_ratio": 1.01}, "out of range"),
        ({"keep_ratio": float("nan")}, "finite number"),
        ({"keep_ratio": float("inf")}, "finite number"),
        ({"keep_ratio": True}, "finite number"),
        ({"keep_ratio": "0.5"}, "finite number"),
        ({"reduction": 0.5}, "out of range"),
        ({"reduction": 0}, "out of range"),
        ({"reduction": -4}, "out of range"),
        ({"reduction": float("inf")}, "finite number"),
    ],
)
def test_impossible_budgets(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(BudgetError, match=message):
        Budget(**arguments)


@given(budgets())
def test_a_budget_says_what_it_is(budget: Budget) -> None:
    name, _, value = str(budget).partition("=")
    assert str(getattr(budget, name)) == value


def test_budgets_compare_and_hash_by_value() -> None:
    assert Budget(keep=3) == Budget(keep=3)
    assert len({Budget(keep=3), Budget(keep=3), Budget(keep=4)}) == 2
