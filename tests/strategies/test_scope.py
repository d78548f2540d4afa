"""SCOPE: an oracle in the notation of the paper."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from support.clouds import clouds, quick
from tokenreduce import VisualTokens
from tokenreduce.errors import PipelineError, TokensError
from tokenreduce.ops import limits
from tokenreduce_strategies.scope import Scope

TIE = 2.5e-7


def slow(x, a, k, alpha, combine):
    """Saliency times coverage, by definition."""
    unit = torch.nn.functional.normalize(x.double(), dim=-1)
    n = len(x)
    s = (unit @ unit.T).tolist()
    saliency = [float(a[j]) ** alpha for j in range(n)]
    picked, covered = [], [0.0] * n
    while len(picked) < k:
        score = {}
        for j in range(n):
            if j not in picked:
                gain = sum(max(0.0, s[i][j] - covered[i]) for i in range(n))
                score[j] = gain + saliency[j] if combine == "add" else gain * saliency[j]
        tie = TIE * max(1.0 if combine == "add" else max(saliency), *score.values())
        picked.append(next(j for j, v in score.items() if v >= max(score.values()) - tie))
        covered = [max(covered[i], s[i][picked[-1]]) for i in range(n)]
    return picked


def tokens_of(cloud, seed):
    batch, n, _ = cloud.shape
    attention = torch.rand(batch, n, generator=torch.Generator().manual_seed(seed))
    return VisualTokens.from_grid(cloud, (1, n), signals={"class_attention": attention})


@quick
@given(clouds(min_tokens=2, dtypes=(torch.float32,)), st.data())
def test_oracle(cloud, data):
    k = data.draw(st.integers(1, cloud.shape[1] - 1))
    options = {
        "alpha": data.draw(st.sampled_from([0.0, 1.0, 1.5])),
        "combine": data.draw(st.sampled_from(["multiply", "add"])),
    }
    tokens = tokens_of(cloud, data.draw(st.integers(0, 100)))
    picks = Scope(keep=k, **options).select(tokens, k)
    attention = tokens.signal("class_attention")
    expected = [slow(x, a, k, **options) for x, a in zip(cloud, attention, strict=True)]
    assert picks.tolist() == expected


def test_too_many_tokens_are_refused(monkeypatch):
    tokens = tokens_of(torch.randn(1, 70, 16, generator=torch.Generator().manual_seed(0)), 0)
    monkeypatch.setattr(limits, "MATRIX_LIMIT", 69)
    with pytest.raises(TokensError, match="coverages of 70 tokens"):
        Scope(keep=12)(tokens)


@pytest.mark.parametrize("options", [{"alpha": -1.0}, {"combine": "divide"}])
def test_options(options):
    with pytest.raises(PipelineError):
        Scope(keep=4, **options)
