"""Encoded items are reduced as the processor promised."""

from __future__ import annotations

import pytest
import torch

import tokenreduce as tr
from tokenreduce.errors import ReductionError, ServingError
from tokenreduce.plugins import installed
from tokenreduce.tokens import VisualTokens
from tokenreduce_integrations.vllm.items import ServedItem
from tokenreduce_integrations.vllm.reducing import reduce_items
from tokenreduce_integrations.vllm.settings import ServedStage
from tokenreduce_integrations.vllm.shapes import Block, Shape

STAGE = ServedStage.from_config({"strategy": "divprune", "reduction": 4})


def features(seed: int, tokens: int) -> torch.Tensor:
    return torch.randn(tokens, 16, generator=torch.Generator().manual_seed(seed))


def test_items_travel_as_bytes_of_any_length() -> None:
    item = ServedItem(shape=Shape.grid(1, 4, 4), stage=STAGE)
    whole = ServedItem(shape=Shape.grid(2, 4, 4), stage=None)
    assert ServedItem.from_tensor(item.to_tensor()) == item
    assert ServedItem.from_batch([item.to_tensor(), whole.to_tensor()]) == [item, whole]
    assert ServedItem.from_batch(torch.stack([item.to_tensor()] * 2)) == [item, item]


def test_items_know_the_text_between_their_tokens() -> None:
    item = ServedItem(
        shape=Shape.grid(2, 1, 2), stage=STAGE, sequence=(70, 9, -2, 10, 71, 9, -2, 10)
    )
    assert item.text == (70, 9, 10, 71, 9, 10)
    assert item.ids(4) == [70, 9, 4, 4, 10, 71, 9, 4, 4, 10]
    assert ServedItem.from_tensor(item.to_tensor()) == item
    assert ServedItem(shape=Shape.grid(1, 1, 2), stage=STAGE).ids(4) == [4, 4]


def test_items_without_settings_are_refused() -> None:
    with pytest.raises(ServingError, match="without settings"):
        ServedItem.from_batch(None)


def test_each_item_is_reduced_by_its_own_settings() -> None:
    other = STAGE.for_request({"strategy": "random", "keep": 3})
    square, wide = Shape.grid(1, 4, 4), Shape.grid(1, 2, 8)
    items = [
        ServedItem(shape=square, stage=STAGE),
        ServedItem(shape=square, stage=None),
        ServedItem(shape=wide, stage=other),
        ServedItem(shape=square, stage=STAGE),
    ]
    given = [features(i, 16) for i in range(4)]
    outcomes = reduce_items(given, items, {})
    assert torch.equal(outcomes[1].features, given[1])
    assert outcomes[1].positions.tolist() == list(range(16))
    assert [item.kept for item in items] == [4, 16, 3, 4]
    for index, shape in ((0, square), (2, wide), (3, square)):
        outcome, stage = outcomes[index], items[index].stage
        assert stage is not None
        alone = stage.reducer()(VisualTokens(given[index][None], shape.layout))
        assert torch.equal(outcome.positions, alone.positions[0])
        assert torch.equal(outcome.features, alone.features[0])


def test_merged_tokens_are_new_and_stand_at_their_anchors() -> None:
    stage = ServedStage.from_config({"strategy": "tome", "reduction": 2})
    item = ServedItem(shape=Shape.grid(1, 4, 4), stage=stage)
    given = features(0, 16)
    (outcome,) = reduce_items([given], [item], {})
    assert len(outcome.features) == item.kept == 8
    assert not torch.equal(outcome.features, given[outcome.positions])


def test_channels_that_strategies_do_not_see_are_reduced_alike() -> None:
    stage = ServedStage.from_config({"strategy": "tome", "reduction": 2})
    item = ServedItem(shape=Shape.grid(1, 4, 4), stage=stage)
    given = features(0, 16)
    (alone,) = reduce_items([given], [item], {})
    (outcome,) = reduce_items([given.repeat(1, 3)], [item], {}, channels=16)
    assert torch.equal(outcome.positions, alone.positions)
    assert torch.equal(outcome.features, alone.features.repeat(1, 3))


def test_frames_with_text_between_them_are_reduced_apart() -> None:
    frame = Block(rows=2, columns=4)
    item = ServedItem(shape=Shape(blocks=(frame, frame), apart=True), stage=STAGE)
    given = features(0, 16)
    (outcome,) = reduce_items([given], [item], {})
    assert item.kept_parts == (2, 2)
    single = ServedItem(shape=Shape(blocks=(frame,)), stage=STAGE)
    first, second = reduce_items([given[:8], given[8:]], [single, single], {})
    assert torch.equal(outcome.features, torch.cat([first.features, second.features]))
    assert torch.equal(outcome.positions, torch.cat([first.positions, second.positions + 8]))


def test_newlines_stay_outside_the_budget() -> None:
    shape = Shape(blocks=(Block(rows=4, columns=4), Block(rows=4, columns=4, newlines="rows")))
    item = ServedItem(shape=shape, stage=STAGE)
    (outcome,) = reduce_items([features(0, 36)], [item], {})
    assert len(outcome.features) == item.kept == 8 + 4
    newlines = shape.layout.protected.nonzero().squeeze(1)
    assert torch.isin(newlines, outcome.positions).all()


def test_signals_go_to_the_items_they_are_of() -> None:
    stage = ServedStage.from_config({"strategy": "fastervlm", "keep": 2})
    items = [ServedItem(shape=Shape.grid(1, 2, 4), stage=stage)] * 2
    attention = [torch.arange(8.0), torch.arange(8.0).flip(0)]
    outcomes = reduce_items([features(0, 8), features(1, 8)], items, {"class_attention": attention})
    assert [outcome.positions.tolist() for outcome in outcomes] == [[6, 7], [0, 1]]


def test_an_encoder_that_gives_other_tokens_is_an_error() -> None:
    item = ServedItem(shape=Shape.grid(1, 4, 4), stage=STAGE)
    with pytest.raises(ReductionError, match="gave 15 tokens"):
        reduce_items([features(0, 15)], [item], {})


def test_an_item_that_cannot_be_reduced_takes_no_other_with_it(
    caplog: pytest.LogCaptureFixture,
) -> None:
    shape = Shape(blocks=(Block(rows=4, columns=4, newlines="rows"),))
    items = [ServedItem(shape=shape, stage=STAGE)] * 2
    good, bad = features(0, 20), features(1, 20)
    bad[3, 5] = torch.inf
    (expected,) = reduce_items([good], items[:1], {})
    outcome, spread = reduce_items([good, bad], items, {})
    assert torch.equal(outcome.features, expected.features)
    newlines = [4, 9, 14, 19]
    assert spread.positions.tolist() == sorted([0, 5, 10, 15, *newlines])
    assert torch.equal(spread.features, bad[spread.positions])
    [record] = caplog.records
    assert "NaN or infinity" in record.getMessage()
    assert "divprune could not choose among the 20 tokens" in record.getMessage()


def test_an_option_that_does_not_suit_the_model_ends_no_engine(
    caplog: pytest.LogCaptureFixture,
) -> None:
    stage = STAGE.for_request({"strategy": "visionzip", "key_heads": 7})
    item = ServedItem(shape=Shape.grid(1, 4, 4), stage=stage)
    signals = {"class_attention": [torch.rand(16)], "keys": [features(2, 16)]}
    (outcome,) = reduce_items([features(0, 16)], [item], signals)
    assert outcome.positions.tolist() == [0, 4, 8, 12]
    assert "key_heads=7" in caplog.text


def test_registered_strategies_keep_what_the_prompt_has_places_for() -> None:
    shape = Shape.grid(2, 4, 6)
    tried = 0
    for name in tr.list_strategies(site="projector"):
        record = installed().strategies[name]
        if record.needs or record.needs_weights or record.wraps or record.count != "exact":
            continue
        stage = ServedStage.from_config({"strategy": name, "reduction": 4})
        item = ServedItem(shape=shape, stage=stage)
        (outcome,) = reduce_items([features(0, 48)], [item], {})
        assert len(outcome.features) == item.kept == 12, name
        tried += 1
    assert tried > 10
