"""Similarity of every token to one, against a slow oracle."""

import pytest
import torch

from tokenreduce.ops import similarity
from tokenreduce.ops.similarity import (
    closest_cosine,
    gram_matrix,
    similarity_to,
    unit_vectors,
)


@pytest.mark.parametrize("with_gram", [True, False])
def test_similarity_to_one_token_of_each_item(with_gram: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    unit = unit_vectors(torch.randn(3, 7, 5, generator=generator))
    index = torch.tensor([0, 6, 3])
    gram = unit @ unit.transpose(1, 2) if with_gram else None
    expected = [[float(token @ x[i]) for token in x] for x, i in zip(unit, index, strict=True)]
    torch.testing.assert_close(similarity_to(unit, index, gram), torch.tensor(expected))


@pytest.mark.parametrize("n", [2, 5, 6, 7, 12])
def test_products_of_all_pairs_by_rows(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(similarity, "GRAM_ROWS", 3)
    monkeypatch.setattr(similarity, "FEW_ROWS", 2)
    unit = unit_vectors(torch.randn(2, n, 5, generator=torch.Generator().manual_seed(n)))
    expected = torch.einsum("bnd,bmd->bnm", unit, unit)
    torch.testing.assert_close(gram_matrix(unit), expected)
    wide = torch.zeros(2, n, n + 1)
    gram_matrix(unit, out=wide[..., :n])
    torch.testing.assert_close(wide[..., :n], expected)
    assert not wide[..., n].any()
    expected.diagonal(dim1=1, dim2=2).fill_(-torch.inf)
    torch.testing.assert_close(closest_cosine(unit), expected.amax(2))
