"""HiRED: an oracle in the notation of the paper."""

from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from support.clouds import quick
from tokenreduce import Layout, VisualTokens
from tokenreduce.errors import PipelineError, TokensError
from tokenreduce_strategies.hired import HiRED


def top(a, members, count):
    return sorted(members, key=lambda i: (-float(a[i]), i))[:count]


def slow(deep, shallow, k, alpha, side, rows, columns):
    """Thumbnail of side x side tokens, then rows x columns tiles of the same size."""
    n = side * side
    own = max(min(int(k * alpha), n), k - rows * columns * n)
    kept = top(deep, range(n), own)
    hits = [0] * (rows * columns)
    for i in top(shallow, range(n), int((1 - alpha) * n)):
        y, x = divmod(i, side)
        hits[(y * rows // side) * columns + x * columns // side] += 1
    shares, left = [0] * len(hits), k - own
    while left:
        free = [t for t in range(len(hits)) if shares[t] < n]
        weight = {t: hits[t] for t in free if hits[t]} or {t: n - shares[t] for t in free}
        exact = {t: Fraction(left * w, sum(weight.values())) for t, w in weight.items()}
        floors = {t: int(e) for t, e in exact.items()}
        spare = left - sum(floors.values())
        for t in sorted(exact, key=lambda t: (floors[t] - exact[t], t))[:spare]:
            floors[t] += 1
        for t, extra in floors.items():
            shares[t] = min(n, shares[t] + extra)
        left = k - own - sum(shares)
    for t, share in enumerate(shares):
        kept += top(deep, range((t + 1) * n, (t + 2) * n), share)
    return sorted(kept)


def tiled(seed, side, rows, columns, batch=2):
    generator = torch.Generator().manual_seed(seed)
    blocks = [Layout.from_grid((side, side), block=b).coords for b in range(rows * columns + 1)]
    layout = Layout(torch.cat(blocks))
    signals = {
        name: torch.randn(batch, len(layout), generator=generator).mul(2).softmax(1)
        for name in ("class_attention", "received_attention")
    }
    return VisualTokens(torch.zeros(batch, len(layout), 1), layout, signals=signals)


@quick
@given(
    st.integers(1, 5),
    st.sampled_from([(1, 2), (1, 3), (2, 2), (2, 3)]),
    st.sampled_from([0.0, 0.3, 0.5, 1.0]),
    st.integers(0, 100),
    st.data(),
)
def test_oracle(side, grid, alpha, seed, data):
    tokens = tiled(seed, side, *grid)
    k = data.draw(st.integers(1, tokens.count - 1))
    reducer = HiRED(keep=k, alpha=alpha, grid=grid, shallow="received_attention")
    deep, shallow = (tokens.signal(name) for name in ("class_attention", "received_attention"))
    expected = [slow(*both, k, alpha, side, *grid) for both in zip(deep, shallow, strict=True)]
    assert reducer(tokens).positions.tolist() == expected


def test_an_image_is_attention_alone():
    attention = torch.rand(2, 30, generator=torch.Generator().manual_seed(0))
    tokens = VisualTokens.from_grid(
        torch.zeros(2, 30, 1), (5, 6), signals={"class_attention": attention}
    )
    kept = HiRED(keep=7)(tokens).positions
    assert kept.equal(attention.topk(7).indices.sort(1).values)


def test_a_mosaic_is_cut_into_tiles():
    thumbnail, mosaic = Layout.from_grid((2, 2)), Layout.from_grid((4, 4), block=1)
    layout = Layout(torch.cat([thumbnail.coords, mosaic.coords]))
    attention = torch.full((1, 20), 0.01)
    # The thumbnail looks at its lower right corner.
    attention[0, 3] = 1
    tokens = VisualTokens(torch.zeros(1, 20, 1), layout, signals={"class_attention": attention})
    kept = HiRED(keep=4, alpha=0.75)(tokens).positions[0].tolist()
    assert kept[3] == 4 + 2 * 4 + 2


def test_official_rounding_loses_tokens():
    tokens = tiled(0, 4, 2, 3, batch=1)
    kept = HiRED(keep=41, official=True)(tokens).kept
    assert kept < 41
    assert HiRED(keep=41, official=True).count_class == "adaptive"


def test_official_shares_are_those_of_its_float32():
    n, alpha = 64, 1 - 12 / 64
    shallow = torch.zeros(n)
    shallow[:7] = shallow[n // 2 : n // 2 + 5] = 1
    thumbnail = torch.arange(n)
    tiles = [thumbnail + n, thumbnail + 2 * n]
    strategy = HiRED(keep=n + 108, alpha=alpha, official=True)
    # 7 of the 12 hits deserve 63 of 108 tokens, 62.999996 in float32.
    assert strategy.shares(shallow, n + 108, thumbnail, tiles, thumbnail // 32) == [n, 62, 45]


def test_tiles_must_fit_the_grid():
    with pytest.raises(TokensError, match="6 tiles"):
        HiRED(keep=9, grid=(2, 2))(tiled(0, 3, 2, 3))


def test_needs_both_signals():
    assert HiRED(keep=1).needs == ("class_attention",)
    needs = HiRED(keep=1, shallow="received_attention").needs
    assert needs == ("class_attention", "received_attention")


@pytest.mark.parametrize("options", [{"alpha": 1.1}, {"grid": (0, 2)}])
def test_options(options):
    with pytest.raises(PipelineError):
        HiRED(keep=4, **options)
