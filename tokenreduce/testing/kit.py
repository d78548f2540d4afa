"""Running checks, by hand and under pytest."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Literal

from tokenreduce.errors import UnknownName, did_you_mean
from tokenreduce.testing.checks import CHECKS, Check
from tokenreduce.testing.subject import CheckFailed, Problem, StrategyLike, Subject

Outcome = Literal["passed", "failed", "expected failure", "blocked", "does not apply"]

NONE: Mapping[str, str] = MappingProxyType({})


@dataclass(frozen=True, kw_only=True)
class CheckResult:
    """What became of one check of one strategy.

    Attributes:
        check: its name.
        meaning: its one line.
        strategy: the name of the strategy.
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


class _Run:
    """One strategy's checks; each runs once, after those that it builds upon."""

    def __init__(self, strategy: StrategyLike, expected_failures: Mapping[str, str]) -> None:
        for name in expected_failures:
            if name not in CHECKS:
                raise UnknownName(f"unknown check {name!r}. {did_you_mean(name, CHECKS)}")
        self.subject = replace(Subject.of(strategy), excused=frozenset(expected_failures))
        self.expected = expected_failures
        self.results: dict[str, CheckResult] = {}

    def result(self, check: Check) -> CheckResult:
        if check.name not in self.results:
            self.results[check.name] = self._run(check)
        return self.results[check.name]

    def _run(self, check: Check) -> CheckResult:
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
            if self.result(CHECKS[name]).outcome in ("failed", "blocked"):
                return done("blocked", f"check {name!r} failed")
        error = self._attempt(check)
        expected = self.expected.get(check.name)
        if expected is not None:
            if error is not None:
                return done("expected failure", expected, error)
            error = CheckFailed(
                check.name, self.subject.name, f"passes, but was expected to fail: {expected}"
            )
        return done("passed") if error is None else done("failed", error.problem, error)

    def _attempt(self, check: Check) -> CheckFailed | None:
        try:
            check.run(self.subject)
        except check.leaves:
            return None
        except Problem as problem:
            return CheckFailed(check.name, self.subject.name, str(problem))
        except Exception as error:  # noqa: BLE001 (whatever a strategy raises is the finding)
            failure = CheckFailed(
                check.name, self.subject.name, f"raised {type(error).__name__}: {error}"
            )
            failure.__cause__ = error
            return failure
        return None


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
    run = _Run(strategy, expected_failures)
    return [run.result(check) for check in CHECKS.values() if slow or not check.slow]


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
    import pytest

    cases = []
    for strategy in strategies:
        run = _Run(strategy, expected_failures)
        for check in CHECKS.values():
            if check.slow != slow or check.applies(run.subject):
                continue
            cases.append(pytest.param(_bind(run, check), id=f"{run.subject.name}-{check.name}"))
    return pytest.mark.parametrize("check", cases)


def _bind(run: _Run, check: Check) -> Callable[[], None]:
    def bound() -> None:
        import pytest

        result = run.result(check)
        if result.outcome == "blocked":
            pytest.skip(f"blocked: {result.detail}")
        if result.outcome == "expected failure":
            pytest.xfail(result.detail)
        if result.error is not None:
            raise result.error

    bound.__doc__ = check.meaning
    return bound
