"""Ratios as the authors' code reads them."""

import pytest

from tokenreduce_strategies.evs import EVS
from tokenreduce_strategies.official import stated_ratio


@pytest.mark.parametrize("budget", [{"keep": 25}, {"keep_ratio": 0.25}, {"reduction": 4}])
def test_stated_ratio(budget):
    assert stated_ratio(EVS(**budget), 100) == 0.25
