"""Running checks, by hand and under pytest."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Generic, Literal

# What registers further checks of strategies, in the order in which they are reported.
import tokenreduce.testing.relations  # noqa: F401
from tokenreduce.errors import UnknownName, did_you_mean
from tokenreduce.testing.check import Check, CheckFailed, Checks, Problem, S
from tokenreduce.testing.checks import CHECKS
from tokenreduce.testing.settings import restored
from tokenreduce.testing.subject import StrategyLike, Subject

Outcome = Literal["passed", "failed", "expected failure", "blocked", "does not apply"]

NONE: Mapping[str, str] = MappingProxyType({})


@dataclass(frozen=True, kw_only=True)
class CheckResult:
    """What became of one check of one strategy, backend or adapter.

    Attributes:
        check: its name.
        meaning: its one line.
        strategy: the name of what was checked.
        outcome: ``"blocked"`` where a check that it builds upon failed.
        detail: what was expected, the reason of an expected failure, or what blocks it.
        error: the failure, if it failed.
    """

    check: str
    meaning: str
    strategy: str
    outcome: Outcome
    detail: str = ""
    error: CheckFailed | None = None

    @property
    def ok(self) -> bool:
        """Whether there is nothing to repair here."""
        return self.outcome in ("passed", "expected failure", "does not apply")


class Run(Generic[S]):
    """The checks of one subject; each runs once, after those that it builds upon.

    Args:
        checks: all that there are.
        subject: what is checked.
        expected_failures: names of checks that fail, with the reason.
        kind: what the subject is, for messages.

    Raises:
        UnknownName: if an expected failure names no check.
    """

    def __init__(
        self,
        checks: Checks[S],
        subject: S,
        expected_failures: Mapping[str, str] = NONE,
        *,
        kind: str = "strategy",
    ) -> None:
        for name in expected_failures:
            if name not in checks:
                raise UnknownName(f"unknown check {name!r}. {did_you_mean(name, checks)}")
        self.checks = checks
        self.subject = subject
        self.expected = expected_failures
        self.kind = kind
        self.results: dict[str, CheckResult] = {}

    def all(self, *, slow: bool = False) -> list[CheckResult]:
        """The result of every check, in order."""
        return [self.result(check) for check in self.checks.values() if slow or not check.slow]

    def parameters(self, *, slow: bool = False) -> Iterable[Any]:
        """A pytest parameter for every check that applies: a function that runs it."""
        import pytest

        for check in self.checks.values():
            if check.slow == slow and not check.applies(self.subject):
                yield pytest.param(self._bound(check), id=f"{self.subject.name}-{check.name}")

    def result(self, check: Check[S]) -> CheckResult:
        """What became of a check."""
        if check.name not in self.results:
            self.results[check.name] = self._run(check)
        return self.results[check.name]

    def _run(self, check: Check[S]) -> CheckResult:
        def done(
            outcome: Outcome, detail: str = "", error: CheckFailed | None = None
        ) -> CheckResult:
            return CheckResult(
                check=check.name,
                meaning=check.meaning,
                strategy=self.subject.name,
                outcome=outcome,
                detail=detail,
                error=error,
            )

        reason = check.applies(self.subject)
        if reason:
            return done("does not apply", reason)
        for name in check.after:
            if self.result(self.checks[name]).outcome in ("failed", "blocked"):
                return done("blocked", f"check {name!r} failed")
        error = self._attempt(check)
        expected = self.expected.get(check.name)
        if expected is not None:
            if error is not None:
                return done("expected failure", expected, error)
            error = self._failure(check, f"passes, but was expected to fail: {expected}")
        return done("passed") if error is None else done("failed", error.problem, error)

    def _attempt(self, check: Check[S]) -> CheckFailed | None:
        try:
            with restored():
                check.run(self.subject)
        except check.leaves:
            return None
        except Problem as problem:
            return self._failure(check, str(problem))
        except Exception as error:  # noqa: BLE001 (whatever a plugin raises is the finding)
            failure = self._failure(check, f"raised {type(error).__name__}: {error}")
            failure.__cause__ = error
            return failure
        return None

    def _failure(self, check: Check[S], problem: str) -> CheckFailed:
        return CheckFailed(check.name, self.subject.name, problem, kind=self.kind)

    def _bound(self, check: Check[S]) -> Callable[[], None]:
        def bound() -> None:
            import pytest

            result = self.result(check)
            if result.outcome == "blocked":
                pytest.skip(f"blocked: {result.detail}")
            if result.outcome == "expected failure":
                pytest.xfail(result.detail)
            if result.error is not None:
                raise result.error

        bound.__doc__ = check.meaning
        return bound


def parametrized(runs: Iterable[Run[Any]], *, slow: bool = False) -> Any:
    """A decorator that makes a pytest test of every check of several runs."""
    import pytest

    cases = [case for run in runs for case in run.parameters(slow=slow)]
    return pytest.mark.parametrize("check", cases)


def run_checks(
    strategy: StrategyLike, expected_failures: Mapping[str, str] = NONE, *, slow: bool = False
) -> list[CheckResult]:
    """Run every check on a strategy.

    Args:
        strategy: a registered name, a class, an instance (its options are kept, its budget is
            not), or a function from a budget to an instance.
        expected_failures: names of checks that fail, with the reason. One that passes after all
            counts as failed, so that the list stays true.
        slow: whether to measure time and memory too, which takes several seconds.

    Returns:
        one result for each check, in the order of :data:`~tokenreduce.testing.CHECKS`.

    Raises:
        UnknownName: if nothing registered the strategy, or there is no such check.
    """
    return _run_of(strategy, expected_failures).all(slow=slow)


def parametrize_checks(
    *strategies: StrategyLike,
    expected_failures: Mapping[str, str] = NONE,
    slow: bool = False,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Make a pytest test of every check of every strategy.

    The decorated test takes one argument, ``check``, and calls it.

    Args:
        strategies: as for :func:`run_checks`.
        expected_failures: likewise, for each of the strategies.
        slow: whether to give the checks of time and memory, instead of all others.

    Raises:
        UnknownName: if nothing registered a strategy, or there is no such check.
    """
    runs = (_run_of(strategy, expected_failures) for strategy in strategies)
    decorator: Callable[[Callable[..., Any]], Callable[..., Any]] = parametrized(runs, slow=slow)
    return decorator


def _run_of(strategy: StrategyLike, expected_failures: Mapping[str, str]) -> Run[Subject]:
    subject = replace(Subject.of(strategy), excused=frozenset(expected_failures))
    return Run(CHECKS, subject, expected_failures)
