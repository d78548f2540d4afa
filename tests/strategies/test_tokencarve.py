"""TokenCarve: scores from the decomposition itself, and who joins whom."""

import pytest
import torch

from tokenreduce import VisualTokens
from tokenreduce.errors import PipelineError
from tokenreduce_strategies.tokencarve import TokenCarve, information


@pytest.mark.parametrize("shape", [(30, 8), (8, 30), (12, 12)])
def test_information(shape):
    x = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    u, s, _ = torch.linalg.svd(x.double(), full_matrices=False)
    expected = (u.abs() * s[:, None]).sum(2)
    torch.testing.assert_close(information(x).double(), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("k", [1, 7, 25, 31])
def test_oracle(k):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 32, 8, generator=generator)
    a = torch.rand(1, 32, generator=generator)
    tokens = VisualTokens.from_grid(x, (4, 8), signals={"last_token_attention": a})
    reduction = TokenCarve(keep=k, balance=0.3)(tokens)
    gain = information(x)[0]
    score = 0.3 * gain / gain.max() + 0.7 * a[0] / a.max()
    order = score.argsort(descending=True).tolist()
    kept, following = sorted(order[:k]), order[k : min(32, k + (k + 1) // 2)]
    groups = {i: [i] for i in kept}
    for i in following:
        cosine = torch.nn.functional.cosine_similarity(x[0, kept], x[0, i][None])
        groups[kept[int(cosine.argmax())]].append(i)
    assert reduction.positions[0].tolist() == kept
    for m, i in enumerate(kept):
        assert (reduction.assignment[0] == m).nonzero().flatten().tolist() == sorted(groups[i])
        torch.testing.assert_close(reduction.features[0, m], x[0, groups[i]].mean(0))


def test_options():
    with pytest.raises(PipelineError, match="balance"):
        TokenCarve(balance=-0.1)
