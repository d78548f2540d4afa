"""Matrices of tokens by tokens stay within a bound."""

import pytest
import torch

from tokenreduce.errors import TokensError
from tokenreduce.ops import limits
from tokenreduce.ops.density_peaks import density_peaks
from tokenreduce.ops.spanning_trees import maximum_spanning_tree
from tokenreduce.ops.weighted_spreading import weighted_farthest_first


@pytest.mark.parametrize(
    "use",
    [
        lambda x: density_peaks(x, torch.ones(len(x), dtype=torch.long)),
        lambda x: weighted_farthest_first(x, x[..., 0], 2),
        maximum_spanning_tree,
    ],
)
def test_too_many_tokens(monkeypatch, use):
    use(torch.ones(1, 9, 2))
    monkeypatch.setattr(limits, "MATRIX_LIMIT", 8)
    with pytest.raises(TokensError, match=r"9 tokens.*per_tile"):
        use(torch.ones(1, 9, 2))
