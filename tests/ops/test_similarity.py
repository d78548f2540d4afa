"""Similarity of every token to one, against a slow oracle."""

import pytest
import torch

from tokenreduce.ops.similarity import similarity_to, unit_vectors


@pytest.mark.parametrize("with_gram", [True, False])
def test_similarity_to_one_token_of_each_item(with_gram: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    unit = unit_vectors(torch.randn(3, 7, 5, generator=generator))
    index = torch.tensor([0, 6, 3])
    gram = unit @ unit.transpose(1, 2) if with_gram else None
    expected = [[float(token @ x[i]) for token in x] for x, i in zip(unit, index, strict=True)]
    torch.testing.assert_close(similarity_to(unit, index, gram), torch.tensor(expected))
