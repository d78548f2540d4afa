"""The conformance kits: does a plugin keep the contract that the framework relies on?

    from tokenreduce.testing import parametrize_checks

    @parametrize_checks("my-strategy")
    def test_conformance(check):
        check()

There is a kit for strategies, neighbour backends, quantizers and model adapters. Everything but the
functions whose names begin with ``parametrize`` works without pytest.
"""

from tokenreduce.testing.adapters import parametrize_adapter_checks, run_adapter_checks
from tokenreduce.testing.check import Check, CheckFailed
from tokenreduce.testing.checks import CHECKS
from tokenreduce.testing.kit import CheckResult, parametrize_checks, run_checks
from tokenreduce.testing.neighbors import parametrize_neighbor_checks, run_neighbor_checks
from tokenreduce.testing.quantizers import parametrize_quantizer_checks, run_quantizer_checks
from tokenreduce.testing.subject import StrategyLike, Subject

__all__ = [
    "CHECKS",
    "Check",
    "CheckFailed",
    "CheckResult",
    "StrategyLike",
    "Subject",
    "parametrize_adapter_checks",
    "parametrize_checks",
    "parametrize_neighbor_checks",
    "parametrize_quantizer_checks",
    "run_adapter_checks",
    "run_checks",
    "run_neighbor_checks",
    "run_quantizer_checks",
]
