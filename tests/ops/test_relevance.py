"""Selection by a score that similar tokens lower: plain Python."""

from unittest.mock import patch

import torch
from hypothesis import given
from hypothesis import strategies as st

from support.clouds import clouds, quick
from tokenreduce.ops import TIE_TOLERANCE, rounds, unit_vectors
from tokenreduce.ops.relevance import exclusive_picks, marginal_relevance


def first_of_the_largest(values):
    best = max(values.values())
    return next(i for i, v in values.items() if v >= best - TIE_TOLERANCE)


def slow_marginal(cosine, score, k, balance):
    n, picked = len(score), []
    while len(picked) < k:
        rest = [i for i in range(n) if i not in picked]
        value = {
            i: balance * score[i] - (1 - balance) * max((cosine[i][j] for j in picked), default=0.0)
            for i in rest
        }
        picked.append(first_of_the_largest(value))
    return picked


def slow_exclusive(cosine, score, k, threshold):
    n, picked, aside = len(score), [], set()
    while len(picked) < k:
        rest = [i for i in range(n) if i not in picked]
        active = [i for i in rest if i not in aside]
        picked.append(first_of_the_largest({i: score[i] for i in active or rest}))
        aside |= {i for i in range(n) if cosine[i][picked[-1]] > threshold}
    return picked


@quick
@given(clouds(dtypes=(torch.float32,)), st.sampled_from([None, 2, rounds.CANDIDATES]), st.data())
def test_oracles(cloud, candidates, data):
    """By the Gram matrix, or in rounds of so many candidates."""
    batch, n, _ = cloud.shape
    k = data.draw(st.integers(1, n))
    balance = data.draw(st.sampled_from([0.0, 0.3, 0.5, 1.0]))
    # No cosine of these clouds lies within rounding of it.
    threshold = data.draw(st.sampled_from([-0.51234567, 0.31234567, 0.91234567]))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 100)))
    score = torch.rand(batch, n, generator=generator)
    unit = unit_vectors(cloud)
    gram = unit @ unit.mT if candidates is None else None
    with patch.object(rounds, "CANDIDATES", candidates or rounds.CANDIDATES):
        marginal = marginal_relevance(unit, score, k, balance=balance, gram=gram).tolist()
        exclusive = exclusive_picks(unit, score, k, threshold=threshold, gram=gram).tolist()
    for b in range(batch):
        cosine = (unit[b].double() @ unit[b].double().T).tolist()
        own = score[b].double().tolist()
        assert marginal[b] == slow_marginal(cosine, own, k, balance)
        assert exclusive[b] == slow_exclusive(cosine, own, k, threshold)
