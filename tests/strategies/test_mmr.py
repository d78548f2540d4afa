"""MMR: which score it reads and how it scales it; the picks have their oracle with the ops."""

import pytest
import torch

from tokenreduce import VisualTokens
from tokenreduce.errors import MissingSignal, PipelineError
from tokenreduce.ops import unit_vectors
from tokenreduce_strategies import mmr
from tokenreduce_strategies.mmr import MMR


def tokens_of(batch=2, n=60, **signals):
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(batch, n, 16, generator=generator)
    signals = signals or {"class_attention": torch.rand(batch, n, generator=generator)}
    return VisualTokens.from_grid(features, (1, n), signals=signals)


def slow(x, s, k, balance):
    """The definition, for scores scaled to [0, 1]."""
    unit = unit_vectors(x).double()
    s = ((s - s.min()) / (s.max() - s.min())).double()
    picked = []
    while len(picked) < k:
        value = {
            i: float(balance * s[i])
            - (1 - balance) * max((float(unit[i] @ unit[j]) for j in picked), default=0.0)
            for i in range(len(x))
            if i not in picked
        }
        picked.append(max(value, key=lambda i: (value[i], -i)))
    return picked


@pytest.mark.parametrize("balance", [0.0, 0.5, 0.9])
def test_oracle(balance):
    tokens = tokens_of()
    score = tokens.signal("class_attention")
    picks = MMR(keep=9, balance=balance).select(tokens, 9)
    assert picks.tolist() == [
        slow(x, s, 9, balance) for x, s in zip(tokens.features, score, strict=True)
    ]


def test_balance_one_is_the_score_alone():
    tokens = tokens_of()
    kept = MMR(keep=9, balance=1.0)(tokens).positions
    assert kept.equal(tokens.signal("class_attention").topk(9).indices.sort(1).values)


def test_any_signal_may_score():
    tokens = tokens_of(received_attention=torch.rand(2, 60))
    assert MMR(keep=3, score="received_attention").needs == ("received_attention",)
    assert MMR(keep=3, score="received_attention")(tokens).kept == 3
    with pytest.raises(MissingSignal):
        MMR(keep=3)(tokens)
    keys = tokens_of(keys=torch.rand(2, 60, 4))
    with pytest.raises(PipelineError, match="one value"):
        MMR(keep=3, score="keys")(keys)


def test_without_a_gram_matrix(monkeypatch):
    tokens = tokens_of()
    whole = MMR(keep=12).select(tokens, 12)
    monkeypatch.setattr(mmr, "GRAM_LIMIT", 59)
    assert MMR(keep=12).select(tokens, 12).equal(whole)


def test_options():
    with pytest.raises(PipelineError, match="balance"):
        MMR(balance=1.5)
