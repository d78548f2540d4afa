"""Places followed through time, against loops over tokens."""

import torch

from tokenreduce.ops import tracks as module
from tokenreduce.ops.tracks import (
    between,
    cosine_to,
    mean_direction,
    track_cosine,
    tracks,
    tubes,
)
from tokenreduce.tokens import Layout


def test_a_track_is_a_place_through_time():
    order, linked = tracks(Layout.from_grid((3, 1, 2)))
    assert order.tolist() == [0, 2, 4, 1, 3, 5]
    assert linked.tolist() == [False, True, True, False, True, True]
    # Two crops of one image share places and times but are not neighbours in time.
    tiles = torch.cat([Layout.from_grid((1, 2), block=block).coords for block in range(2)])
    assert not bool(tracks(Layout(tiles))[1].any())
    assert not bool(tracks(Layout.line(4))[1].any())


def test_tubes_are_runs_of_repeats():
    order, _ = tracks(Layout.from_grid((4, 1, 2)))
    repeats = torch.tensor([0, 0, 1, 0, 1, 1, 0, 1], dtype=torch.bool)
    heads, tube = tubes(order, repeats)
    assert heads.tolist() == [0, 1, 3, 6]
    assert tube.tolist() == [0, 1, 0, 2, 0, 2, 3, 2]


def test_cosines_in_parts(monkeypatch):
    monkeypatch.setattr(module, "PART_TOKENS", 5)
    features = torch.randn(24, 8, generator=torch.Generator().manual_seed(0))
    features[3] = 0
    unit = torch.nn.functional.normalize(features.double(), dim=-1)
    unit[3] = 8**-0.5
    order, linked = tracks(Layout.from_grid((4, 2, 3)))
    cosine = track_cosine(features, order, linked)
    assert bool((cosine[:6] == -torch.inf).all())
    torch.testing.assert_close(cosine[6:].double(), (unit[6:] * unit[:-6]).sum(-1))
    sizes = torch.arange(1.0, 25)[None]
    mean = (sizes.double() @ unit) / sizes.sum()
    torch.testing.assert_close(mean_direction(features, sizes).double(), mean)
    rows, other = torch.arange(0, 24, 2), torch.arange(23, 0, -2)
    direction = mean[0].float()
    torch.testing.assert_close(cosine_to(features, rows, direction).double(), unit[rows] @ mean[0])
    expected = (unit[rows] * unit[other]).sum(-1)
    torch.testing.assert_close(between(features, rows, other).double(), expected)
