"""Random walks over attention, step by step."""

import pytest
import torch

from tokenreduce.ops.page_rank import attention_page_rank


@pytest.mark.parametrize("damping", [0.0, 0.15])
@pytest.mark.parametrize("iterations", [0, 3])
def test_oracle(damping, iterations):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 7, 7, generator=generator)
    logits = logits.masked_fill(torch.ones(7, 7).triu(1).bool(), -torch.inf)
    got = attention_page_rank(logits, tau=0.5, iterations=iterations, damping=damping)
    for b in range(2):
        total = [0.0] * 7
        for h in range(3):
            walk = (logits[b, h].double() / 0.5).softmax(1).tolist()
            p = [1 / 7] * 7
            for _ in range(iterations):
                p = [
                    (1 - damping) * sum(p[i] * walk[i][j] for i in range(7)) + damping / 7
                    for j in range(7)
                ]
            total = [s + share**2 / 3 for s, share in zip(total, p, strict=True)]
        torch.testing.assert_close(got[b], torch.tensor(total).sqrt())


def test_half_precision():
    logits = torch.randn(1, 2, 9, 9, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert attention_page_rank(logits).equal(attention_page_rank(logits.float()))
