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
@pytest.mark.parametrize("official", [False, True])
def test_oracle(k, official):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 32, 8, generator=generator)
    a = torch.rand(1, 32, generator=generator)
    tokens = VisualTokens.from_grid(x, (4, 8), signals={"last_token_attention": a})
    reduction = TokenCarve(keep=k, balance=0.3, official=official)(tokens)
    gain = information(x)[0]
    score = 0.3 * gain / gain.max() + 0.7 * a[0] / a.max()
    if official:
        rank = [sorted(values.tolist(), reverse=True) for values in (gain, a[0])]
        score = torch.tensor(
            [
                -0.3 * rank[0].index(g) - 0.7 * rank[1].index(b)
                for g, b in zip(gain.tolist(), a[0].tolist(), strict=True)
            ]
        )
    order = score.argsort(descending=True).tolist()[: min(32, k + k // 2)]
    targets, rest = sorted(order[: len(order) // 2]), order[len(order) // 2 :]
    closest = {}
    for i in rest:
        if targets:
            cosine = torch.nn.functional.cosine_similarity(x[0, targets], x[0, i][None])
            closest[i] = (float(cosine.max()), targets[int(cosine.argmax())])
    joining = sorted(closest, key=lambda i: -closest[i][0])[: len(order) - k]
    kept = sorted(set(order) - set(joining))
    groups = {i: [i] for i in kept}
    for i in joining:
        groups[closest[i][1]].append(i)
    assert reduction.positions[0].tolist() == kept
    for m, i in enumerate(kept):
        assert (reduction.assignment[0] == m).nonzero().flatten().tolist() == sorted(groups[i])
        torch.testing.assert_close(reduction.features[0, m], x[0, groups[i]].mean(0))


def test_options():
    with pytest.raises(PipelineError, match="balance"):
        TokenCarve(balance=-0.1)
