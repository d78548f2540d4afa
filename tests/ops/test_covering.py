"""Covering representatives against a slow oracle, and what is told of their groups."""

import pytest
import torch

from tokenreduce.ops.covering import (
    DISTANCE_NOISE,
    covering_representatives,
    distance_to_larger,
    join_nearest,
    mean_and_spread,
)


def slow(unit, sizes, radius, first, least, most):
    """One item at a time, one token at a time."""
    picks = []
    for x, s, r, start in zip(unit, sizes, radius, first, strict=True):
        chosen = [int(start)]
        while len(chosen) < most:
            cosine = [[float(token @ x[c]) for c in chosen] for token in x]
            owner = [row.index(max(row)) for row in cosine]
            distance = [max(0.0, 1 - DISTANCE_NOISE - max(row)) for row in cosine]
            out = [0.0 if i in chosen else d for i, d in enumerate(distance)]
            if max(out) <= float(r):
                if len(chosen) >= least:
                    break
                extent = [sum(float(s[j]) for j in range(len(x)) if owner[j] == o) for o in owner]
                out = [0.0 if i in chosen else distance[i] * extent[i] for i in range(len(x))]
            chosen.append(max(range(len(x)), key=lambda i: out[i]))
        picks.append(sorted(chosen + [int(start)] * (most - len(chosen))))
    return torch.tensor(picks)


@pytest.mark.parametrize("with_gram", [True, False])
@pytest.mark.parametrize("radius", [0.0, 0.4, 0.9, 2.0])
def test_covering_representatives_equal_the_oracle(radius: float, with_gram: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    unit = torch.nn.functional.normalize(torch.randn(3, 20, 5, generator=generator), dim=-1)
    sizes = torch.randint(1, 4, (3, 20), generator=generator).float()
    first = torch.tensor([0, 7, 19])
    radii = torch.full((3,), radius)
    gram = unit @ unit.transpose(1, 2) if with_gram else None
    found = covering_representatives(unit, sizes, radii, first=first, least=4, most=9, gram=gram)
    assert torch.equal(found, slow(unit, sizes, radii, first, 4, 9))


def test_who_joins_whom():
    cosine = torch.tensor([[[1.0, 0.2], [0.9, 0.3], [0.1, 0.4], [0.6, 0.7], [0.2, 1.0]]])
    group = join_nearest(cosine, torch.tensor([[0, 4]]), torch.tensor([0.65]))
    assert group.tolist() == [[0, 0, -1, 1, 1]]


def test_a_pick_that_is_repeated_stands_for_itself_once():
    cosine = torch.tensor([[[1.0, 0.3, 1.0], [0.5, 0.9, 0.5]]])
    group = join_nearest(cosine, torch.tensor([[0, 1, 0]]), torch.tensor([0.99]))
    assert group.tolist() == [[0, 1]]


def test_distance_to_larger():
    distance = torch.tensor([[[0.0, 3, 1], [3, 0, 2], [1, 2, 0]]])
    size = torch.tensor([[2.0, 5, 2]])
    # The first and the last are equally large: the first counts as larger.
    assert distance_to_larger(distance, size).tolist() == [[3.0, 3.0, 1.0]]


def test_spread_is_the_mean_distance_of_two_tokens():
    unit = torch.nn.functional.normalize(
        torch.randn(1, 6, 4, generator=torch.Generator().manual_seed(0)), dim=-1
    )
    sizes = torch.tensor([[1.0, 2, 1, 1, 3, 1]])
    mean, spread = mean_and_spread(unit, sizes)
    share = sizes[0] / sizes.sum()
    torch.testing.assert_close(mean[0], share @ unit[0])
    expected = share @ (1 - unit[0] @ unit[0].T) @ share
    torch.testing.assert_close(spread[0], expected)
