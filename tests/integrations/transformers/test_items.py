"""Several images, tiles, and images beside clips: what is an item, and whose budget it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import tokenreduce as tr
from support import tiny_models
from support.reducers import Chooses
from support.tiny_models import BOS, CASES, IMAGE, Case, Item, noise, pad, words
from tokenreduce.errors import BudgetError
from tokenreduce_integrations.transformers import layouts


def logits(case: Case) -> torch.Tensor:
    with torch.no_grad():
        return case.model(**case.batch()).logits


def several(stock: Case, *, newline_only: bool) -> Case:
    """Two tiled images of different size in the first prompt, one in the second.

    Args:
        newline_only: LLaVA-OneVision gives images that share a prompt one tile and a newline each.
    """
    first = (88, 52)
    inputs = pad(
        [
            [BOS, *words(3, 1), *[IMAGE] * first[0], *words(2, 2), *[IMAGE] * first[1], 30],
            [BOS, *words(2, 3), *[IMAGE] * 88, *words(2, 4)],
        ],
        "left",
    )
    inputs["pixel_values"] = noise(3, 5, 3, 56, 56)
    inputs["image_sizes"] = torch.tensor([[112, 112], [50, 100], [112, 112]])
    large, low = stock.items[:2]
    items = (large, Item(0, IMAGE, low.coords, low.protected), Item(1, IMAGE, *_of(large)))
    if newline_only:
        inputs["input_ids"] = pad(
            [
                [BOS, *words(3, 1), *[IMAGE] * 17, *words(2, 2), *[IMAGE] * 17, *words(3, 5)],
                [BOS, *words(2, 3), *[IMAGE] * 88, *words(2, 4)],
            ],
            "left",
        )["input_ids"]
        inputs["attention_mask"] = (inputs["input_ids"] != tiny_models.PAD).long()
        inputs["batch_num_images"] = torch.tensor([2, 1])
        tile = [*tiny_models.grid(1, 4, 4), (0, 0, 3, 4)]
        items = (Item(0, IMAGE, tile, (16,)), Item(0, IMAGE, tile, (16,)), items[2])
    return Case(stock.model, inputs, items)


def _of(item: Item) -> tuple[Any, Any]:
    return item.coords, item.protected


SEVERAL: dict[str, Callable[[], Case]] = {
    "llava-next": lambda: several(tiny_models.llava_next(), newline_only=False),
    "onevision": lambda: several(tiny_models.onevision(), newline_only=False),
    "onevision-several": lambda: several(tiny_models.onevision(), newline_only=True),
    "onevision-and-clip": tiny_models.onevision,
    "internvl": tiny_models.internvl,
    "qwen2-vl-and-clip": tiny_models.qwen2_vl,
    "qwen2.5-vl-and-clip": tiny_models.qwen2_5_vl,
    "qwen3-vl-and-clip": tiny_models.qwen3_vl,
}


@pytest.fixture(params=SEVERAL)
def case(request: pytest.FixtureRequest) -> Case:
    return SEVERAL[request.param]()


def free(item: Item) -> int:
    return len(item.coords) - len(item.protected)


def test_a_budget_is_for_each_image_with_its_tiles_and_each_clip(case: Case) -> None:
    with tr.attach(case.model, tr.create_strategy("uniform", keep=3)) as run:
        logits(case)
        found, receipt = run.reductions, run.receipt
    assert len(found) == len(case.items)
    for item, reduced, entry in zip(case.items, found, receipt.items, strict=True):
        assert reduced.prompt == entry.prompt == item.prompt
        assert reduced.layout.coords.tolist() == [list(place) for place in item.coords]
        assert entry.tokens_out == 3 + len(item.protected)
        assert set(item.protected) <= set(reduced.kept.tolist())
        ids = case.inputs["input_ids"][item.prompt, reduced.columns]
        assert bool((ids == item.token).all())


@pytest.mark.parametrize("total", [6, 11, 2000])
def test_a_total_is_shared_by_the_items_of_a_prompt(case: Case, total: int) -> None:
    before = logits(case)
    stage = tr.Stage(reducer=tr.create_strategy("uniform"), total=total)
    with tr.attach(case.model, stage) as run:
        after = logits(case)
        receipt = run.receipt
    for prompt in (0, 1):
        mine = [i for i, item in enumerate(case.items) if item.prompt == prompt]
        available = [free(case.items[i]) for i in mine]
        kept = [receipt.items[i].tokens_out - len(case.items[i].protected) for i in mine]
        assert sum(kept) == min(total, sum(available))
        assert kept == tr.Budget(total=total).shares(available)
    if total == 2000:
        assert torch.equal(after, before)
        assert receipt.reason == "within the budget of the prompt (total=2000)"


def test_a_total_smaller_than_the_number_of_items_is_refused(case: Case) -> None:
    stage = tr.Stage(reducer=tr.create_strategy("uniform"), total=1)
    with tr.attach(case.model, stage), pytest.raises(BudgetError, match="one token for each"):
        logits(case)


# -- InternVL: which tiles make an image ---------------------------------------------------------


def test_tiles_of_an_image_are_one_item_with_a_block_for_each() -> None:
    case = tiny_models.internvl()
    with tr.attach(case.model, tr.create_strategy("uniform", keep=4)) as run:
        logits(case)
        blocks = [item.layout.coords[:, 0].unique().tolist() for item in run.reductions]
        assert [item.prompt for item in run.reductions] == [0, 0, 1]
    assert blocks == [[0, 1, 2], [0, 1], [0, 1]]


def test_a_choice_may_take_all_from_one_tile() -> None:
    case = tiny_models.internvl()
    with tr.attach(case.model, Chooses(keep=4, indices=(4, 5, 6, 7))) as run:
        logits(case)
        assert all(item.coords[:, 0].tolist() == [1] * 4 for item in run.reductions)
    per_tile = tr.create_strategy("per-tile", inner=tr.create_strategy("uniform"), keep_ratio=0.5)
    with tr.attach(case.model, per_tile) as run:
        logits(case)
        assert run.reductions[0].coords[:, 0].tolist() == [0, 0, 1, 1, 2, 2]


def test_beams_and_features_encoded_once_keep_their_tiles() -> None:
    case = tiny_models.internvl()
    batch = case.batch()
    with tr.attach(case.model, tr.create_strategy("uniform", keep=3)) as run, torch.no_grad():
        expected = case.model(**batch).logits
        encoded = case.model.model.get_image_features(batch.pop("pixel_values"), return_dict=True)
        again = case.model(**batch, mm_encoder_outputs={"image": encoded}).logits
        assert torch.equal(again, expected)
        case.model.generate(**case.batch(), num_beams=2, max_new_tokens=1, do_sample=False)
        # beams repeat the items of each prompt
        assert [item.tokens_out for item in run.receipt.items] == [3] * 6


# -- the packing of tiles is asked once ----------------------------------------------------------


@pytest.mark.parametrize("name", ["llava-next", "onevision"])
def test_the_layout_of_a_size_is_asked_for_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES[name]()
    asked = []
    stock = layouts._newlines

    def counting(*args: Any) -> Any:
        asked.append(args[1])
        return stock(*args)

    monkeypatch.setattr(layouts, "_newlines", counting)
    with tr.attach(case.model, tr.create_strategy("uniform", keep=3)):
        for _ in range(3):
            logits(case)
    assert len(asked) == 2
