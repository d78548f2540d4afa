"""Average and bilinear pooling: torch's own functions are the oracles."""

import pytest
import torch
from torch.nn import functional

from tokenreduce import Layout, VisualTokens, per_tile
from tokenreduce.errors import TokensError
from tokenreduce_strategies.avg_pool import AvgPool
from tokenreduce_strategies.bilinear_pool import BilinearPool


def image(*grid, batch=2):
    generator = torch.Generator().manual_seed(0)
    count = torch.Size(grid).numel()
    return VisualTokens.from_grid(torch.randn(batch, count, 5, generator=generator), grid)


@pytest.mark.parametrize(("grid", "keep", "pooled"), [((6, 6), 9, (3, 3)), ((7, 5), 13, (4, 3))])
def test_average_of_an_image(grid, keep, pooled):
    tokens = image(*grid)
    reduction = AvgPool(keep=keep)(tokens)
    maps = tokens.features.transpose(1, 2).unflatten(2, grid)
    expected = functional.adaptive_avg_pool2d(maps, pooled).flatten(2).transpose(1, 2)
    torch.testing.assert_close(reduction.features, expected)


@pytest.mark.parametrize(("grid", "keep", "pooled"), [((6, 6), 9, (3, 3)), ((7, 5), 6, (3, 2))])
def test_bilinear_of_an_image(grid, keep, pooled):
    tokens = image(*grid)
    reduction = BilinearPool(keep=keep)(tokens)
    maps = tokens.features.transpose(1, 2).unflatten(2, grid)
    resized = functional.interpolate(maps, pooled, mode="bilinear", align_corners=False)
    torch.testing.assert_close(reduction.features, resized.flatten(2).transpose(1, 2))


def test_bilinear_halving_is_averaging():
    tokens = image(6, 8)
    torch.testing.assert_close(
        BilinearPool(reduction=4)(tokens).features, AvgPool(reduction=4)(tokens).features
    )


def test_bilinear_drops_what_it_skips():
    reduction = BilinearPool(keep=4)(image(6, 6))
    assert reduction.positions[0].tolist() == [7, 10, 25, 28]
    assert (reduction.assignment[0] >= 0).nonzero().flatten().tolist() == [7, 10, 25, 28]


def test_average_accounts_for_every_token():
    reduction = AvgPool(keep=9)(image(6, 6))
    assert reduction.group_sizes().tolist() == [[4.0] * 9] * 2
    assert reduction.positions[0].tolist() == [7, 9, 11, 19, 21, 23, 31, 33, 35]


@pytest.mark.parametrize("pool", [AvgPool, BilinearPool])
def test_clips_are_pooled_frame_by_frame(pool):
    clip = image(3, 4, 4)
    reduction = pool(keep=14)(clip)
    assert reduction.kept == 12
    for t in range(3):
        frame = VisualTokens.from_grid(clip.features[:, 16 * t : 16 * t + 16], (4, 4))
        torch.testing.assert_close(
            reduction.features[:, 4 * t : 4 * t + 4], pool(keep=4)(frame).features
        )


@pytest.mark.parametrize("pool", [AvgPool, BilinearPool])
def test_fewer_tokens_than_frames(pool):
    clip = image(6, 3, 3)
    reduction = pool(keep=3)(clip)
    assert reduction.kept == 3
    if pool is AvgPool:
        expected = clip.features.unflatten(1, (3, 18)).mean(2)
        torch.testing.assert_close(reduction.features, expected)


@pytest.mark.parametrize("pool", [AvgPool, BilinearPool])
def test_tiles_are_refused_with_a_way_out(pool):
    coords = torch.cat([Layout.from_grid((4, 4), block=b).coords for b in range(2)])
    tokens = VisualTokens(torch.randn(1, 32, 4), coords)
    with pytest.raises(TokensError, match="per_tile"):
        pool(keep=8)(tokens)
    assert per_tile(pool(keep=4))(tokens).kept == 8
