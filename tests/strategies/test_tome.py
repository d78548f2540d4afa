"""ToMe: an oracle in the notation of the paper, round after round."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from support.clouds import clouds, quick
from tokenreduce import VisualTokens
from tokenreduce_strategies.tome import ToMe, merge_round

TIE = 2.5e-7


def slow(x, s, k):
    """Members and mean of every output, in order of position."""
    outputs = [(i, [i], x[i].double(), float(s[i])) for i in range(len(x))]
    while len(outputs) > k:
        r = min(len(outputs) - k, len(outputs) // 2)
        unit = [torch.nn.functional.normalize(o[2], dim=0, eps=1e-8) for o in outputs]
        a, b = range(0, len(outputs), 2), range(1, len(outputs), 2)
        edges = []
        for i in a:
            cosine = [float(unit[i] @ unit[j]) for j in b]
            best = next(n for n, c in enumerate(cosine) if c >= max(cosine) - TIE)
            edges.append((i, b[best], cosine[best]))
        threshold = sorted((c for _, _, c in edges), reverse=True)[r - 1]
        surely = [e for e in edges if e[2] > threshold + TIE]
        near = [e for e in edges if e not in surely and e[2] >= threshold - TIE]
        merged = [list(o) for o in outputs]
        gone = set()
        for i, j, _ in surely + near[: r - len(surely)]:
            place, members, mean, size = merged[j]
            _, more, other, weight = outputs[i]
            joined = (mean * size + other * weight) / (size + weight)
            merged[j] = [place, members + more, joined, size + weight]
            gone.add(i)
        outputs = [tuple(o) for n, o in enumerate(merged) if n not in gone]
    return outputs


@quick
@given(clouds(min_tokens=2, dtypes=(torch.float32,)), st.data())
def test_oracle(cloud, data):
    batch, n, _ = cloud.shape
    k = data.draw(st.integers(1, n - 1))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 100)))
    sizes = torch.randint(1, 4, (batch, n), generator=generator).float()
    source = VisualTokens.from_grid(cloud, (1, n))
    reduction = ToMe(keep=k)(VisualTokens(cloud, source.layout, sizes=sizes))
    for b in range(batch):
        outputs = slow(cloud[b], sizes[b], k)
        assert reduction.positions[b].tolist() == [place for place, *_ in outputs]
        for m, (_, members, mean, size) in enumerate(outputs):
            assert (reduction.assignment[b] == m).nonzero().flatten().tolist() == sorted(members)
            torch.testing.assert_close(
                reduction.features[b, m].double(), mean, rtol=1e-4, atol=1e-5
            )
            assert float(reduction.group_sizes(sizes)[b, m]) == size


def test_a_class_token_never_merges():
    features = torch.ones(1, 9, 4)
    done = merge_round(features, features, torch.ones(1, 9), 99, class_token=True)
    assert done.stays.tolist() == [[0, 1, 3, 5, 7]]
    assert done.groups[0, 0] == 0
    assert done.sizes.tolist() == [[1, 5, 1, 1, 1]]


def test_many_rounds_meet_the_budget():
    tokens = VisualTokens.from_grid(torch.randn(1, 577, 8), (1, 577))
    for keep in (1, 3, 100, 288, 289, 576):
        assert ToMe(keep=keep)(tokens).kept == keep
