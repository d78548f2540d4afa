"""VScan: windows, global picks and merging, by definition."""

import pytest
import torch

from tokenreduce import VisualTokens
from tokenreduce.errors import PipelineError
from tokenreduce_strategies.vscan import VScan


def image(height=24, width=24, frames=1, batch=2):
    generator = torch.Generator().manual_seed(0)
    n = frames * height * width
    signals = {
        name: torch.rand(batch, n, generator=generator).softmax(1)
        for name in ("class_attention", "shallow_class_attention")
    }
    x = torch.randn(batch, n, 8, generator=generator)
    return VisualTokens.from_grid(x, (frames, height, width), signals=signals)


def slow(x, deep, shallow, k):
    """The official form, on 24 x 24 tokens in 16 windows: who is kept, and their groups."""
    near = set()
    for row in range(0, 24, 6):
        for column in range(0, 24, 6):
            window = [y * 24 + x for y in range(row, row + 6) for x in range(column, column + 6)]
            window.sort(key=lambda i: (-shallow[i], i))
            near |= set(window[: (k // 2) // 16])
    others = sorted(set(range(576)) - near, key=lambda i: (-deep[i], i))
    kept = sorted(near | set(others[: k - k // 2]))
    unit = torch.nn.functional.normalize(x.double(), dim=-1)
    goes = [kept[int((unit[kept] @ unit[i]).argmax())] for i in range(576)]
    return kept, [i if i in kept else goes[i] for i in range(576)]


@pytest.mark.parametrize("k", [40, 64, 72])
def test_official(k):
    tokens = image()
    reduction = VScan(keep=k, official=True)(tokens)
    deep, shallow = (
        tokens.signal(name).tolist() for name in ("class_attention", "shallow_class_attention")
    )
    for b in range(2):
        kept, goes = slow(tokens.features[b], deep[b], shallow[b], k)
        assert reduction.positions[b].tolist() == kept
        assert [kept[m] for m in reduction.assignment[b].tolist()] == goes
        members = [i for i in range(576) if goes[i] == kept[3]]
        mean = tokens.features[b, members].mean(0)
        torch.testing.assert_close(reduction.features[b, 3], mean)


def test_budgets_are_exact():
    tokens = image(7, 10, frames=3)
    for k in (1, 2, 50, 209):
        assert VScan(keep=k)(tokens).kept == k
    # 64 divides evenly: both forms agree.
    even = image()
    assert VScan(keep=64)(even).positions.equal(VScan(keep=64, official=True)(even).positions)


def test_every_window_has_its_share():
    tokens = image(8, 8)
    near = VScan(windows=4).local(tokens, 35).reshape(2, 4, 2, 4, 2).sum((2, 4))
    assert near.sum((1, 2)).tolist() == [35, 35]
    assert near.min() >= 2


def test_another_signal():
    strategy = VScan(keep=9, shallow="class_attention")
    assert strategy.needs == ("class_attention",)
    assert strategy(image(6, 6)).kept == 9


def test_options():
    with pytest.raises(PipelineError, match="windows"):
        VScan(windows=0)
