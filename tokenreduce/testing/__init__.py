"""The conformance kit: does a strategy keep the contract that the framework relies on?

    from tokenreduce.testing import parametrize_checks

    @parametrize_checks("my-strategy")
    def test_conformance(check):
        check()

Everything but :func:`parametrize_checks` works without pytest.
"""

from tokenreduce.testing.checks import CHECKS, Check
from tokenreduce.testing.kit import CheckResult, parametrize_checks, run_checks
from tokenreduce.testing.subject import CheckFailed, StrategyLike, Subject

__all__ = [
    "CHECKS",
    "Check",
    "CheckFailed",
    "CheckResult",
    "StrategyLike",
    "Subject",
    "parametrize_checks",
    "run_checks",
]
