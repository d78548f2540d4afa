"""STTM: an oracle in the notation of the paper, quadtree by recursion."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from support.clips import Clip, clips, structured_clip
from support.clouds import quick
from tokenreduce.errors import PipelineError
from tokenreduce_strategies.sttm import STTM


def cosine(one, other):
    lengths = one.norm() * other.norm()
    return float(one @ other / lengths) if lengths else 0.0


def levels_of(frame):
    """Arrays of cells, finest first: (feature, {token: weight}, children) by row and column."""
    h, w, _ = frame.shape
    levels = [[[(frame[y, x].double(), {y * w + x: 1.0}, []) for x in range(w)] for y in range(h)]]
    while min(len(levels[-1]), len(levels[-1][0])) > 2:
        below = levels[-1]

        def bands(n):
            odd = [[0]] if n % 2 else []
            return odd + [[i, i + 1] for i in range(n % 2, n, 2)]

        above = []
        for rows in bands(len(below)):
            above.append([])
            for columns in bands(len(below[0])):
                children = [below[y][x] for y in rows for x in columns]
                feature = torch.stack([c[0] for c in children]).mean(0)
                weights = {n: v / len(children) for c in children for n, v in c[1].items()}
                above[-1].append((feature, weights, children))
        levels.append(above)
    return levels


def slow_cells(frame, threshold):
    """Cells of one frame as (feature, weights), by first token."""
    levels = levels_of(frame)
    found = []

    def visit(cell, depth):
        feature, weights, children = cell
        if depth == 0:
            found.append((feature, weights))
            return
        first = levels[depth - 1][0][0]
        slots = children + [first] * (4 - len(children))
        if all(cosine(feature, slot[0]) >= threshold for slot in slots):
            found.append((feature, weights))
            return
        for child in children:
            visit(child, depth - 1)

    for row in levels[-1]:
        for cell in row:
            visit(cell, len(levels) - 1)
    return sorted(found, key=lambda cell: min(cell[1]))


def slow(x, grid, threshold, temporal):
    """Groups of cells, by first token: (feature, weights over all tokens)."""
    _, h, w = grid
    cells = []
    for t, frame in enumerate(x):
        for feature, weights in slow_cells(frame.reshape(h, w, -1), threshold):
            cells.append((t, feature, {t * h * w + n: v for n, v in weights.items()}))
    groups = [{i} for i in range(len(cells))]
    for i, (t, one, here) in enumerate(cells):
        for j, (later, other, there) in enumerate(cells):
            over = {n + h * w for n in here} & set(there)
            if later != t + 1 or not over or cosine(one, other) < temporal:
                continue
            a = next(g for g in groups if i in g)
            b = next(g for g in groups if j in g)
            if a is not b:
                a |= b
                groups.remove(b)
    outputs = []
    for group in sorted(groups, key=min):
        feature = torch.stack([cells[i][1] for i in group]).mean(0)
        tokens = sorted(n for i in group for n in cells[i][2])
        outputs.append((min(cells[min(group)][2]), tokens, feature))
    return outputs


@quick
@given(clips(max_frames=3, max_side=6, batches=1), st.sampled_from([0.5, 0.8, 0.95]))
def test_oracle(clip, threshold):
    reduction = STTM(threshold=threshold, temporal_threshold=0.7)(clip.tokens())
    outputs = slow(clip.features[0], clip.grid, threshold, 0.7)
    assert reduction.positions[0].tolist() == [place for place, *_ in outputs]
    for m, (_, members, feature) in enumerate(outputs):
        assert (reduction.assignment[0] == m).nonzero().flatten().tolist() == members
        torch.testing.assert_close(reduction.features[0, m].double(), feature, rtol=1e-4, atol=1e-5)


def test_a_uniform_region_needs_one_token():
    image = torch.randn(8, 8, 16, generator=torch.Generator().manual_seed(0))
    image[:4, :4] = image[0, 0]
    tokens = Clip(image.reshape(1, 1, 64, 16), (1, 8, 8)).tokens()
    reduction = STTM()(tokens)
    assert int(reduction.group_sizes()[0, 0]) == 16
    # With a budget, cells like their parts are the last to be split.
    for keep in (4, 7, 20, 40):
        reduction = STTM(keep=keep)(tokens)
        assert reduction.kept == keep
        assert int(reduction.group_sizes()[0, 0]) == 16


def test_a_still_clip_is_merged_over_time():
    frame = torch.randn(1, 1, 36, 16, generator=torch.Generator().manual_seed(0))
    still = Clip(frame.expand(1, 5, 36, 16), (5, 6, 6)).tokens()
    one = STTM(threshold=0.9)(Clip(frame, (1, 6, 6)).tokens())
    assert STTM(threshold=0.9)(still).positions.equal(one.positions)
    assert STTM(threshold=0.9, temporal_threshold=0)(still).kept == 5 * one.kept
    assert STTM(keep=10)(still).kept == 10


def test_root_level_bounds_the_cells():
    flat = Clip(torch.ones(1, 1, 256, 8), (1, 16, 16)).tokens()
    assert [STTM(root_level=level)(flat).kept for level in range(5)] == [4, 16, 64, 256, 256]


def test_options():
    tokens = structured_clip(1, (2, 4, 4), 8).tokens()
    assert STTM().count_class == "adaptive"
    assert STTM(keep=3).count_class == "exact"
    assert STTM(official=True)(tokens).kept
    with pytest.raises(PipelineError, match="knows no budget"):
        STTM(official=True, keep=3)
    for options in ({"threshold": 2}, {"temporal_threshold": -2}, {"root_level": -1}):
        with pytest.raises(PipelineError, match=next(iter(options))):
            STTM(**options)


def test_tokens_weigh_alike_by_area():
    # A side of five is cut into one and two pairs: cells of a level differ in area.
    clip = structured_clip(1, (4, 5, 6), 8, change=0.4, seed=3)
    reduction = STTM(threshold=0.6, temporal_threshold=0.6, by_area=True)(clip.tokens())
    assert reduction.kept < 60
    flat = clip.features.flatten(1, 2)
    for m in range(reduction.kept):
        members = (reduction.assignment[0] == m).nonzero().flatten()
        torch.testing.assert_close(reduction.features[0, m], flat[0, members].mean(0))


def test_on_even_sides_area_changes_the_means_alone():
    clip = structured_clip(1, (4, 8, 8), 8, change=0.4, seed=3)
    cells, areas = (STTM(by_area=area)(clip.tokens()) for area in (False, True))
    assert areas.assignment.equal(cells.assignment)
    assert not areas.features.equal(cells.features)
