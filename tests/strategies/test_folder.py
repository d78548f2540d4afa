"""FOLDER: an oracle in the notation of the paper, fold after fold."""

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from support.clouds import clouds, quick
from tokenreduce import VisualTokens
from tokenreduce_strategies.folder import Folder

TIE = 2.5e-7


def slow(x, s, k):
    """Members of every output, in order of position."""
    outputs = [(i, [i], x[i].double(), float(s[i])) for i in range(len(x))]
    while len(outputs) > k:
        n = len(outputs)
        r = min(n - k, max(1, (n - 1) // 2))
        unit = [torch.nn.functional.normalize(o[2], dim=0, eps=1e-8) for o in outputs]
        edges = []
        for i in range(0, n, 2):
            cosine = {j: float(unit[i] @ unit[j]) for j in range(1, n, 2)}
            best = next(j for j, c in cosine.items() if c >= max(cosine.values()) - TIE)
            edges.append((i, best, cosine[best]))
        limit = sorted((c for *_, c in edges), reverse=True)[r - 1]
        surely = [e for e in edges if e[2] > limit + TIE]
        near = [e for e in edges if e not in surely and e[2] >= limit - TIE]
        folded, gone = [list(o) for o in outputs], set()
        for i, j, _ in surely + near[: r - len(surely)]:
            _, more, other, weight = outputs[i]
            place, members, mean, size = folded[j]
            mean = (mean * size + other * weight) / (size + weight)
            folded[j] = [place, members + more, mean, size + weight]
            gone.add(i)
        outputs = [tuple(o) for m, o in enumerate(folded) if m not in gone]
    return outputs


@quick
@given(clouds(min_tokens=2, dtypes=(torch.float32,)), st.booleans(), st.data())
def test_oracle(cloud, official, data):
    batch, n, _ = cloud.shape
    k = data.draw(st.integers(1, n - 1))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 100)))
    sizes = torch.randint(1, 4, (batch, n), generator=generator).float()
    layout = VisualTokens.from_grid(cloud, (1, n)).layout
    reduction = Folder(keep=k, official=official)(VisualTokens(cloud, layout, sizes=sizes))
    # Once folded twice, or if little was merged.
    scaled = official and (n - k > (n - 1) // 2 or n - k < k // 2)
    for b in range(batch):
        outputs = slow(cloud[b], sizes[b], k)
        assert reduction.positions[b].tolist() == [place for place, *_ in outputs]
        for m, (_, members, mean, size) in enumerate(outputs):
            assert (reduction.assignment[b] == m).nonzero().flatten().tolist() == sorted(members)
            expected = mean * (1 + math.log(size)) if scaled else mean
            torch.testing.assert_close(
                reduction.features[b, m].double(), expected, rtol=1e-4, atol=1e-5
            )


def test_any_budget_is_met():
    tokens = VisualTokens.from_grid(torch.randn(1, 577, 8), (1, 577))
    for keep in (1, 2, 100, 288, 289, 576):
        assert Folder(keep=keep)(tokens).kept == keep
