"""NormTopK: sorting by norm is the oracle."""

import math

from hypothesis import given
from hypothesis import strategies as st

from support.clouds import clouds, quick
from tokenreduce import VisualTokens
from tokenreduce_strategies.norm_topk import NormTopK


def slow(x, k):
    norms = [math.sqrt(sum(float(value) ** 2 for value in token)) for token in x]
    near = 1e-6 * max(norms)
    order = sorted(range(len(x)), key=lambda i: -norms[i])
    threshold = norms[order[k - 1]]
    surely = [i for i in order if norms[i] > threshold + near]
    tied = [i for i in range(len(x)) if i not in surely and norms[i] >= threshold - near]
    return sorted(surely + tied[: k - len(surely)])


@quick
@given(clouds(min_tokens=2), st.data())
def test_oracle(cloud, data):
    k = data.draw(st.integers(1, cloud.shape[1] - 1))
    tokens = VisualTokens.from_grid(cloud, (1, cloud.shape[1]))
    assert NormTopK(keep=k)(tokens).positions.tolist() == [slow(item, k) for item in cloud]
