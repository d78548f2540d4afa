"""Every registered strategy keeps the contract."""

from tokenreduce.plugins import installed
from tokenreduce.testing import parametrize_checks


@parametrize_checks(*installed().strategies)
def test_conformance(check):
    check()
