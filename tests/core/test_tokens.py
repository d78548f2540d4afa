"""Tokens, layouts and packing."""

from __future__ import annotations

import pytest
import torch

import tokenreduce as tr
from support.reducers import Chooses, UnevenRandom
from tokenreduce.errors import MissingSignal, PositionsError, TokensError, UnknownName


def test_grids_are_recognised() -> None:
    assert tr.Layout.from_grid((2, 3, 4)).grid == (2, 3, 4)
    assert tr.Layout.from_grid((3, 4)).grid == (1, 3, 4)
    assert tr.Layout.line(7).grid == (1, 1, 7)
    shuffled = tr.Layout.from_grid((3, 4)).coords.flip(0)
    assert tr.Layout(shuffled).grid is None
    tiles = torch.cat([tr.Layout.from_grid((2, 2), block=b).coords for b in range(2)])
    assert tr.Layout(tiles).grid is None
    assert tr.Layout.from_grid((3, 4)) == tr.Layout.from_grid((1, 3, 4))
    assert tr.Layout.from_grid((3, 4)) != tr.Layout.from_grid((4, 3))


@pytest.mark.parametrize(
    ("coords", "message"),
    [
        (torch.zeros(4, 3, dtype=torch.long), r"shape \(N, 4\)"),
        (torch.zeros(4, 4), "integers"),
        (torch.zeros(5, 4, dtype=torch.long), "5 tokens, features hold 4"),
    ],
)
def test_wrong_coords_are_refused(coords: torch.Tensor, message: str) -> None:
    with pytest.raises(TokensError, match=message):
        tr.VisualTokens(torch.zeros(1, 4, 8), coords)


def test_wrong_features_sizes_and_signals_are_refused() -> None:
    line = tr.Layout.line(4)
    with pytest.raises(TokensError, match="floating point"):
        tr.VisualTokens(torch.zeros(1, 4, 8, dtype=torch.long), line)
    with pytest.raises(TokensError, match="batch, tokens, channels"):
        tr.VisualTokens(torch.zeros(4, 8), line)
    with pytest.raises(TokensError, match="sizes"):
        tr.VisualTokens(torch.zeros(1, 4, 8), line, sizes=torch.ones(4))
    with pytest.raises(UnknownName, match="class_attention"):
        tr.VisualTokens(torch.zeros(1, 4, 8), line, signals={"class_atention": torch.zeros(1, 4)})
    with pytest.raises(TokensError, match="axes"):
        tr.VisualTokens(torch.zeros(1, 4, 8), line, signals={"class_attention": torch.zeros(1, 3)})
    with pytest.raises(MissingSignal, match="carry none"):
        tr.VisualTokens(torch.zeros(1, 4, 8), line).signal("class_attention")
    with pytest.raises(TokensError, match="grid"):
        tr.VisualTokens.from_grid(torch.zeros(1, 4, 8), (0, 4))


def test_select_takes_signals_and_sizes_along() -> None:
    tokens = tr.VisualTokens(
        torch.arange(8.0).reshape(1, 4, 2),
        tr.Layout.from_grid((2, 2)),
        sizes=torch.tensor([[1.0, 2.0, 3.0, 4.0]]),
        signals={
            "class_attention": torch.tensor([[0.1, 0.2, 0.3, 0.4]]),
            "prompt_embeddings": torch.ones(1, 3, 2),
        },
    )
    part = tokens.select(torch.tensor([1, 3]))
    assert part.features[0, :, 0].tolist() == [2.0, 6.0]
    assert part.sizes.tolist() == [[2.0, 4.0]]
    assert part.signal("class_attention").tolist() == [[pytest.approx(0.2), pytest.approx(0.4)]]
    assert part.signal("prompt_embeddings").shape == (1, 3, 2)
    assert part.coords.tolist() == [[0, 0, 0, 1], [0, 0, 1, 1]]


def items(*shapes: tuple[int, ...]) -> list[tr.VisualTokens]:
    result = []
    for seed, shape in enumerate(shapes):
        layout = tr.Layout.from_grid(shape)
        generator = torch.Generator().manual_seed(seed)
        result.append(tr.VisualTokens(torch.randn(1, len(layout), 6, generator=generator), layout))
    return result


@pytest.mark.parametrize(
    "reducer", [tr.create_strategy("norm-topk", keep_ratio=0.3), UnevenRandom()]
)
def test_packed_items_are_reduced_as_if_alone(reducer: tr.Reducer) -> None:
    singles = items((4, 4), (2, 3, 3), (4, 4), (1, 5), (4, 4))
    packed = tr.PackedTokens.from_items(singles)
    together = tr.reduce_packed(packed, [reducer] * len(singles))
    for single, result in zip(singles, together, strict=True):
        alone = reducer(single)
        assert torch.equal(result.positions, alone.positions)
        assert torch.equal(result.features, alone.features)


def test_items_of_one_layout_side_by_side_are_not_copied() -> None:
    packed = tr.PackedTokens.from_items(items((4, 4), (4, 4)))
    bucket = packed.bucket([0, 1])
    assert bucket.features.data_ptr() == packed.features.data_ptr()


def test_packing_refuses_layouts_that_do_not_fit() -> None:
    with pytest.raises(TokensError, match="layouts describe"):
        tr.PackedTokens(features=torch.zeros(3, 2), layouts=(tr.Layout.line(4),))


@pytest.mark.parametrize("coords", [[[0, 0, 0, 0]] * 4, None, "grid"])
def test_values_that_are_no_tensors_are_refused(coords: object) -> None:
    with pytest.raises(TokensError, match="must be a torch tensor"):
        tr.VisualTokens(torch.zeros(1, 4, 8), coords)
    with pytest.raises(TokensError, match="features must be a torch tensor"):
        tr.VisualTokens([[0.0]], tr.Layout.line(1))
    with pytest.raises(TokensError, match="reduces VisualTokens"):
        tr.create_strategy("norm-topk", keep=1)(torch.zeros(1, 4, 8))


@pytest.mark.parametrize("grid", [6, None, (2.5, 2), "23", (1, 2, 3, 4)])
def test_grids_that_are_none_are_refused(grid: object) -> None:
    with pytest.raises(TokensError, match="a grid is"):
        tr.VisualTokens.from_grid(torch.zeros(1, 6, 8), grid)


def test_strategies_that_break_their_contract_are_caught() -> None:
    tokens = tr.VisualTokens(torch.randn(1, 6, 4), tr.Layout.line(6))
    for indices in ([0, 0], [0, 6], [-1, 2]):
        with pytest.raises(PositionsError, match="distinct"):
            Chooses(keep=2, indices=indices)(tokens)
