"""DART: an oracle with an exact budget."""

import pytest
import torch

from tokenreduce import VisualTokens
from tokenreduce.errors import PipelineError
from tokenreduce_strategies.dart import DART


def slow(x, keys, t, prompt_keys, k, pivots):
    def largest(own, count):
        norm = own.abs().sum(1).tolist()
        return sorted(range(len(norm)), key=lambda i: (-norm[i], i))[:count]

    picked = largest(keys, min(pivots, k))
    turns = [x[i] for i in picked] + [t[i] for i in largest(prompt_keys, min(pivots, len(t)))]
    each, left = divmod(k - len(picked), len(turns))
    for turn, pivot in enumerate(turns):
        cosine = torch.nn.functional.cosine_similarity(x.double(), pivot[None].double()).tolist()
        others = sorted(set(range(len(x))) - set(picked), key=lambda i: (cosine[i], i))
        picked += others[: each + (turn < left)]
    return sorted(picked)


@pytest.mark.parametrize("k", [1, 3, 4, 9, 25, 39])
@pytest.mark.parametrize("words", [2, 7])
def test_oracle(k, words):
    generator = torch.Generator().manual_seed(k)

    def draw(*shape):
        return torch.randn(2, *shape, generator=generator)

    x, keys, t, prompt_keys = draw(40, 8), draw(40, 6), draw(words, 8), draw(words, 6)
    signals = {"decoder_keys": keys, "prompt_states": t, "prompt_keys": prompt_keys}
    tokens = VisualTokens.from_grid(x, (5, 8), signals=signals)
    items = zip(x, keys, t, prompt_keys, strict=True)
    assert DART(keep=k)(tokens).positions.tolist() == [slow(*item, k, 4) for item in items]


def test_official_shares_do_not_shrink_the_pivots():
    draw = torch.Generator().manual_seed(0)
    x, keys = torch.randn(1, 40, 8, generator=draw), torch.randn(1, 40, 6, generator=draw)
    signals = {"decoder_keys": keys, "prompt_states": x[:, :9], "prompt_keys": keys[:, :9]}
    tokens = VisualTokens.from_grid(x, (5, 8), signals=signals)
    # A budget below the four visual pivots, and one of whole shares of 8 pivots beside them.
    assert DART(keep_ratio=0.05, official=True)(tokens).kept == 4
    assert DART(keep=16, official=True)(tokens).kept == 20
    assert DART(keep=16)(tokens).kept == 16


def test_options():
    with pytest.raises(PipelineError, match="pivots"):
        DART(pivots=0)
