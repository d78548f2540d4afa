"""Every registered strategy stays within the time and memory of its cost class."""

import pytest

from tokenreduce.plugins import installed
from tokenreduce.testing import parametrize_checks

pytestmark = pytest.mark.slow


@parametrize_checks(
    *(r.name for r in installed().strategies.values() if not r.needs_weights and not r.wraps),
    slow=True,
)
def test_cost(check):
    check()
