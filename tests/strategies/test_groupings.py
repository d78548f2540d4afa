"""Groupings: density peaks without weights, semantic tokens and projections with them."""

import pytest
import torch
from safetensors.torch import save_file

from tokenreduce import VisualTokens
from tokenreduce.errors import BudgetError, PipelineError
from tokenreduce.ops.density_peaks import density_peaks
from tokenreduce_strategies.density_peak_grouping import DensityPeakGrouping
from tokenreduce_strategies.space_to_depth import SpaceToDepth
from tokenreduce_strategies.token_grouping import TokenGrouping


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def image(*grid, batch=2, channels=8):
    tokens = 1
    for extent in grid:
        tokens *= extent
    return VisualTokens.from_grid(draw(batch, tokens, channels), grid)


def test_density_peaks():
    tokens = image(5, 6)
    reduction = DensityPeakGrouping(keep=7)(tokens)
    peaks = density_peaks(tokens.features, torch.tensor([7, 7]))
    stands = reduction.positions.gather(1, reduction.assignment)
    assert stands.equal(peaks.centre_of)
    with pytest.raises(PipelineError, match="neighbors"):
        DensityPeakGrouping(neighbors=0)


@pytest.fixture
def semantic(tmp_path):
    path = tmp_path / "semantic.safetensors"
    tensors = {
        "semantic_tokens": draw(9, 5),
        "query.weight": draw(4, 5, seed=1),
        "key.weight": draw(4, 8, seed=2),
    }
    save_file(tensors, path)
    return str(path), tensors


@pytest.mark.parametrize("k", [None, 9, 4, 1])
def test_semantic_tokens(semantic, k):
    path, w = semantic
    tokens = image(5, 6)
    strategy = TokenGrouping(weights=path, keep=k)
    strategy.prepare(torch.device("cpu"), torch.float32)
    reduction = strategy(tokens)
    for b, x in enumerate(tokens.features.double()):
        queries = w["semantic_tokens"].double() @ w["query.weight"].double().T
        fits = queries @ (x @ w["key.weight"].double().T).T / 2
        total = fits.softmax(0).sum(1).tolist()
        ranked = sorted(range(9), key=lambda m: -total[m])[: k or 9]
        claims = {}
        for m in ranked:
            free = [i for i in range(30) if i not in claims]
            claims[max(free, key=lambda i: float(fits[m, i]))] = m
        stands = {m: i for i, m in claims.items()}
        goes = [
            stands[claims.get(i, max(ranked, key=lambda m: float(fits[m, i])))] for i in range(30)
        ]
        assert reduction.positions[b].tolist() == sorted(claims)
        assert reduction.positions[b, reduction.assignment[b]].tolist() == goes


def test_more_than_there_are(semantic):
    path, _ = semantic
    with pytest.raises(BudgetError, match="9 semantic tokens"):
        TokenGrouping(weights=path, keep=12)(image(5, 6))
    assert TokenGrouping(weights=path)(image(2, 2)).kept == 4


def test_weights_are_needed():
    cpu = torch.device("cpu")
    with pytest.raises(PipelineError, match="density-peak-grouping"):
        TokenGrouping().prepare(cpu, torch.float32)
    with pytest.raises(PipelineError, match="avg-pool"):
        SpaceToDepth().prepare(cpu, torch.float32)


@pytest.fixture
def projection(tmp_path):
    def save(side, channels=8, bias=True):
        tensors = {"weight": draw(channels, side * side * channels)}
        if bias:
            tensors["bias"] = draw(channels, seed=3)
        path = tmp_path / f"{side}-{channels}-{bias}.safetensors"
        save_file(tensors, path)
        return str(path), tensors

    return save


@pytest.mark.parametrize(("side", "grid"), [(2, (1, 4, 6)), (2, (3, 5, 7)), (3, (2, 4, 6))])
@pytest.mark.parametrize("bias", [True, False])
def test_space_to_depth(projection, side, grid, bias):
    path, w = projection(side, bias=bias)
    tokens = image(*grid)
    strategy = SpaceToDepth(weights=path)
    strategy.prepare(torch.device("cpu"), torch.float32)
    reduction = strategy(tokens)
    clip = tokens.features.unflatten(1, grid)
    m = 0
    for t in range(grid[0]):
        for y in range(0, grid[1], side):
            for x in range(0, grid[2], side):
                parts, members = [], set()
                for dy in range(side):
                    for dx in range(side):
                        r, c = min(y + dy, grid[1] - 1), min(x + dx, grid[2] - 1)
                        parts.append(clip[:, t, r, c])
                        members.add((t * grid[1] + r) * grid[2] + c)
                made = torch.cat(parts, dim=1) @ w["weight"].T + w.get("bias", 0)
                torch.testing.assert_close(reduction.features[:, m], made, atol=1e-4, rtol=1e-4)
                assert reduction.positions[0, m] == min(members)
                found = (reduction.assignment[0] == m).nonzero().flatten().tolist()
                assert found == sorted(members)
                m += 1
    assert reduction.kept == m


def test_width_mismatch(projection):
    with pytest.raises(PipelineError, match="of shape 8 x any"):
        SpaceToDepth(weights=projection(2, channels=6)[0])(image(4, 6))


def test_no_square_block(tmp_path):
    path = tmp_path / "three.safetensors"
    save_file({"weight": draw(8, 24)}, path)
    with pytest.raises(PipelineError, match="no square block"):
        SpaceToDepth(weights=str(path))(image(4, 6))
    save_file({"weight": draw(8, 32), "bias": draw(7)}, tmp_path / "bias.safetensors")
    with pytest.raises(PipelineError, match=r"'bias' of 8 values, got \(7,\)"):
        SpaceToDepth(weights=str(tmp_path / "bias.safetensors"))(image(4, 6))
    with pytest.raises(BudgetError, match="no budget"):
        SpaceToDepth(weights=str(path), keep=4)
