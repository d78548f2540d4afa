"""DyMU, and merging by keys: rounds on a budget, pairs above a threshold without one."""

import pytest
import torch

from tokenreduce import VisualTokens
from tokenreduce.errors import PipelineError
from tokenreduce_strategies.dymu import DyMU, calibrated_threshold
from tokenreduce_strategies.tome import ToMe


def image(seed=0, n=24, batch=1, **signals):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, n, 8, generator=generator).cumsum(1)
    return VisualTokens.from_grid(x, (1, n), signals=signals)


@pytest.mark.parametrize("threshold", [0.5, 0.9, 0.99])
def test_threshold(threshold):
    tokens = image()
    x = torch.nn.functional.normalize(tokens.features[0].double(), dim=-1)
    goes = list(range(24))
    for a in range(0, 24, 2):
        best = max(range(1, 24, 2), key=lambda b: float(x[a] @ x[b]))
        if x[a] @ x[best] > threshold:
            goes[a] = best
    reduction = DyMU(threshold=threshold)(tokens)
    places = sorted(set(goes))
    assert reduction.positions[0].tolist() == places
    assert reduction.assignment[0].tolist() == [places.index(i) for i in goes]


def test_budget_is_that_of_tome():
    tokens = image(keys=torch.randn(1, 24, 5, generator=torch.Generator().manual_seed(2)))
    for k in (1, 5, 13, 23):
        one, other = DyMU(keep=k)(tokens), ToMe(keep=k)(tokens)
        assert one.positions.equal(other.positions)
        assert one.features.equal(other.features)


def test_keys_are_compared_where_there_are_any():
    keys = torch.randn(1, 24, 5, generator=torch.Generator().manual_seed(2))
    plain, keyed = ToMe(keep=16)(image()), ToMe(keep=16)(image(keys=keys))
    assert not plain.assignment.equal(keyed.assignment)
    # The groups are those of the keys, the means those of the tokens.
    of_keys = ToMe(keep=16)(VisualTokens.from_grid(keys, (1, 24)))
    assert keyed.assignment.equal(of_keys.assignment)
    torch.testing.assert_close(keyed.features, of_keys.apply(image().features))


def test_calibration():
    tokens = image(batch=5)
    threshold = calibrated_threshold(tokens.features, 7)
    lost = [24 - DyMU(threshold=threshold)(tokens.item(b)).kept for b in range(5)]
    assert sum(lost) == 35
    assert len(set(lost)) > 1
    assert calibrated_threshold(torch.eye(6)[None], 1) == 0.0


def test_alone_and_options():
    reduction = DyMU()(VisualTokens.from_grid(torch.randn(1, 1, 4), (1, 1)))
    assert reduction.reason == "a single token has no partner"
    with pytest.raises(PipelineError, match="threshold"):
        DyMU(threshold=2.0)
