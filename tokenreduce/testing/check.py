"""What a check is: a name, a one-line meaning, and checks that must pass before it says much.

A check is a function of a subject, which is whatever a kit checks; it returns, or calls
:func:`fail`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, NoReturn, Protocol, TypeVar

from tokenreduce.errors import TokenReduceError


class Named(Protocol):
    """What is checked has a name."""

    @property
    def name(self) -> str: ...


S = TypeVar("S", bound=Named)


class CheckFailed(TokenReduceError, AssertionError):
    """Something does not conform: names the check, what was checked and what was expected.

    Attributes:
        check: the name of the check.
        strategy: the name of the strategy, backend or adapter.
        problem: what was expected.
    """

    def __init__(self, check: str, strategy: str, problem: str, *, kind: str = "strategy") -> None:
        super().__init__(f"check {check!r}: {kind} {strategy!r} {problem}")
        self.check = check
        self.strategy = strategy
        self.problem = problem


class Problem(Exception):
    """What a check found; the kit adds which check and of what."""


def fail(problem: str) -> NoReturn:
    """End a check: the subject ``problem`` (a phrase such as "kept 3 tokens, expected 2")."""
    raise Problem(problem)


@dataclass(frozen=True)
class Check(Generic[S]):
    """A named check.

    Attributes:
        name: what to call it, in expected failures too.
        meaning: one line.
        run: the function.
        after: checks without which this one says nothing.
        applies: why it does not apply to a subject; empty if it does.
        leaves: errors that are the finding of another check.
        slow: whether it takes seconds, and so runs only when asked for.
    """

    name: str
    meaning: str
    run: Callable[[S], None]
    after: tuple[str, ...] = ()
    applies: Callable[[S], str] = lambda subject: ""
    leaves: tuple[type[TokenReduceError], ...] = ()
    slow: bool = False


class Checks(dict[str, Check[S]], Generic[S]):
    """Checks by name, in the order in which they are reported."""

    def add(
        self,
        name: str,
        *,
        after: tuple[str, ...] = (),
        applies: Callable[[S], str] = lambda subject: "",
        leaves: tuple[type[TokenReduceError], ...] = (),
        slow: bool = False,
    ) -> Callable[[Callable[[S], None]], Callable[[S], None]]:
        """Make a check of a function; the first line of its docstring is the meaning."""

        def added(run: Callable[[S], None]) -> Callable[[S], None]:
            meaning = (run.__doc__ or "").strip().partition("\n")[0]
            self[name] = Check(name, meaning, run, after, applies, leaves, slow)
            return run

        return added
