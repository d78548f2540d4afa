"""Pooling of grids: torch's own pooling and brute force are the oracles."""

from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from support.clouds import quick
from tokenreduce.ops import average_axis, bilinear_axis, grid_map, merge_tokens, pooled_grid

AXES = {"average": average_axis, "bilinear": bilinear_axis}


@st.composite
def sides(draw):
    n = draw(st.integers(1, 30))
    return n, draw(st.integers(1, n))


@quick
@given(st.sampled_from(list(AXES)), sides())
def test_axis(kind, side):
    n, m = side
    axis = AXES[kind](n, m)
    assert axis.weights.shape == (m, n)
    torch.testing.assert_close(axis.weights.sum(1), torch.ones(m, dtype=torch.float64))
    position = axis.position.tolist()
    assert position == sorted(set(position))
    for output in range(m):
        assert int(axis.owner[position[output]]) == output
        assert float(axis.weights[output, position[output]]) > 0
    for place in range(n):
        owner = int(axis.owner[place])
        if owner < 0:
            assert float(axis.weights[:, place].sum()) == 0
        else:
            assert float(axis.weights[owner, place]) > 0


@quick
@given(sides(), sides(), sides())
def test_average_map_is_adaptive_average_pooling(time, height, width):
    grid, pooled = zip(time, height, width, strict=True)
    mapped = grid_map(*(average_axis(n, m) for n, m in (time, height, width)))
    features = torch.rand(3, *grid)
    expected = functional.adaptive_avg_pool3d(features, pooled).flatten(1).T
    merged = merge_tokens(features.flatten(1).T[None], mapped.weights, len(mapped.positions))
    torch.testing.assert_close(merged[0], expected, rtol=1e-4, atol=1e-5)


@quick
@given(sides(), sides())
def test_bilinear_map_is_interpolation(height, width):
    (h, new_h), (w, new_w) = height, width
    mapped = grid_map(average_axis(1, 1), bilinear_axis(h, new_h), bilinear_axis(w, new_w))
    features = torch.rand(1, 3, h, w)
    resized = functional.interpolate(features, (new_h, new_w), mode="bilinear", align_corners=False)
    merged = merge_tokens(features.flatten(2).transpose(1, 2), mapped.weights, new_h * new_w)
    torch.testing.assert_close(merged, resized.flatten(2).transpose(1, 2), rtol=1e-4, atol=1e-5)


@quick
@given(sides(), sides(), sides(), st.sampled_from(list(AXES)))
def test_source_map(time, height, width, kind):
    axes = [average_axis(*time), AXES[kind](*height), AXES[kind](*width)]
    mapped = grid_map(*axes)
    (t, _), (h, new_h), (w, new_w) = time, height, width
    positions = mapped.positions.tolist()
    assert positions == sorted(set(positions))
    assert mapped.assignment[mapped.positions].tolist() == list(range(len(positions)))
    for token in (0, t * h * w // 2, t * h * w - 1):
        place = (token // (h * w), token // w % h, token % w)
        owners = [int(axis.owner[p]) for axis, p in zip(axes, place, strict=True)]
        expected = -1 if min(owners) < 0 else (owners[0] * new_h + owners[1]) * new_w + owners[2]
        assert int(mapped.assignment[token]) == expected


def slow_pooled_grid(grid, k):
    frames, height, width = grid
    if k <= frames:
        return k, 1, 1
    best = None
    for h in range(1, height + 1):
        for w in range(1, width + 1):
            if frames * h * w > k:
                continue
            stretch = Fraction(h * width, w * height)
            stretch = max(stretch, 1 / stretch)
            merit = (Fraction(h * w) * min(Fraction(1), 2 / stretch), -stretch, -h)
            if best is None or merit > best[0]:
                best = merit, (frames, h, w)
    return best[1]


@quick
@given(st.integers(1, 4), st.integers(1, 14), st.integers(1, 14), st.data())
def test_pooled_grid(frames, height, width, data):
    k = data.draw(st.integers(1, frames * height * width))
    assert pooled_grid((frames, height, width), k) == slow_pooled_grid((frames, height, width), k)


@pytest.mark.parametrize(
    ("grid", "k", "expected"),
    [
        ((1, 24, 24), 36, (1, 6, 6)),
        ((1, 24, 24), 64, (1, 8, 8)),
        ((1, 24, 24), 37, (1, 6, 6)),
        ((1, 24, 24), 24, (1, 4, 6)),
        ((1, 24, 24), 1, (1, 1, 1)),
        ((1, 1, 32), 5, (1, 1, 5)),
        ((1, 3, 4), 3, (1, 1, 3)),
        ((8, 14, 14), 392, (8, 7, 7)),
        ((8, 14, 14), 8, (8, 1, 1)),
        ((8, 14, 14), 3, (3, 1, 1)),
    ],
)
def test_pooled_grid_of_known_cases(grid, k, expected):
    assert pooled_grid(grid, k) == expected
