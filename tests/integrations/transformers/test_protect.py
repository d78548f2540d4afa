"""Protected regions: which tokens they are in each family, and that they survive."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import tokenreduce as tr
from support import tiny_models
from support.reducers import EveryOther
from support.tiny_models import CASES, Case, Item
from tokenreduce.errors import TokensError, UnsupportedSite

#: The upper right quarter, and a sliver inside one cell of the lower left.
REGIONS = [(0.5, 0.0, 1.0, 0.5), (0.01, 0.99, 0.02, 1.0)]
#: A tile of InternVL shows an unknown part of the picture.
NAMES = [name for name in CASES if name != "internvl"]


def logits(case: Case) -> torch.Tensor:
    with torch.no_grad():
        return case.model(**case.batch()).logits


def extents(item: Item) -> dict[int, tuple[int, int]]:
    """(rows, columns) of each block, from the tokens that are not structural."""
    found: dict[int, tuple[int, int]] = {}
    for place, (block, _, y, x) in enumerate(item.coords):
        if place not in item.protected:
            rows, columns = found.get(block, (0, 0))
            found[block] = (max(rows, y + 1), max(columns, x + 1))
    return found


def covered(item: Item, regions: list[tuple[float, ...]]) -> set[int]:
    """Tokens whose cell shares an area with a region."""
    sides, tokens = extents(item), set()
    for place, (block, _, y, x) in enumerate(item.coords):
        rows, columns = sides[block]
        for x0, y0, x1, y1 in regions:
            wide = min((x + 1) / columns, x1) - max(x / columns, x0)
            high = min((y + 1) / rows, y1) - max(y / rows, y0)
            if wide > 1e-9 and high > 1e-9 and place not in item.protected:
                tokens.add(place)
    return tokens


@pytest.mark.parametrize("reducer", ["prune", "merge"])
@pytest.mark.parametrize("name", NAMES)
def test_tokens_of_a_region_survive_in_every_block_and_frame(name: str, reducer: str) -> None:
    case = CASES[name]()
    strategy = tr.create_strategy("norm-topk", keep=1) if reducer == "prune" else EveryOther(keep=1)
    with tr.attach(case.model, strategy, protect=REGIONS) as run:
        logits(case)
        receipt, reductions = run.receipt, run.reductions
    for item, found, entry in zip(case.items, reductions, receipt.items, strict=True):
        expected = covered(item, REGIONS) | set(item.protected)
        assert set(found.layout.protected.nonzero().squeeze(1).tolist()) == expected
        assert expected < set(found.kept.tolist())
        assert entry.stages[0].protected == len(expected)
        assert entry.tokens_out == len(expected) + 1


@pytest.mark.parametrize("name", ["llava-next", "qwen3-vl"])
def test_protected_tokens_reach_the_llm_as_they_are(name: str) -> None:
    case = CASES[name]()
    seen: dict[str, Any] = {}

    def capture(_: Any, __: Any, kwargs: dict[str, Any]) -> None:
        seen.update(kwargs)

    decoder = case.model.model.language_model
    handle = decoder.register_forward_pre_hook(capture, with_kwargs=True)
    logits(case)
    full = seen["inputs_embeds"]
    with tr.attach(case.model, EveryOther(keep=1), protect=REGIONS) as run:
        handle.remove()
        handle = decoder.register_forward_pre_hook(capture, with_kwargs=True)
        logits(case)
        shorter = seen["inputs_embeds"]
        for item in run.reductions:
            guarded = item.layout.protected.nonzero().squeeze(1)
            for token in full[item.prompt, item.columns[guarded]]:
                assert bool((shorter[item.prompt] == token).all(-1).any())
    handle.remove()


def test_regions_of_each_item_and_of_one_call() -> None:
    case = CASES["llava-several-images"]()
    everything = [(0, 0, 1, 1)]
    each: list[list[Any]] = [everything, [], [(0, 0, 0.25, 0.25)], []]
    with tr.attach(case.model, tr.create_strategy("norm-topk", keep=4), protect=each) as run:
        logits(case)
        assert [item.tokens_out for item in run.receipt.items] == [16, 4, 5, 4]
        assert run.receipt.items[0].stages[0].reason == "no unprotected tokens"
        with run.protecting(everything):
            logits(case)
            assert run.receipt.ratio == 1.0
        with run.protecting([]):
            logits(case)
            assert [item.tokens_out for item in run.receipt.items] == [4, 4, 4, 4]
        with run.disabled():
            logits(case)
        logits(case)
        assert [item.tokens_out for item in run.receipt.items] == [16, 4, 5, 4]
        with run.protecting(each[:3]), pytest.raises(TokensError, match="3 visual items"):
            logits(case)


def test_regions_stand_outside_a_total() -> None:
    case = CASES["llava-several-images"]()
    stage = tr.Stage(reducer=tr.create_strategy("norm-topk"), total=12)
    with tr.attach(case.model, stage, protect=[(0, 0, 1, 0.25)]) as run:
        logits(case)
        assert [item.tokens_out for item in run.receipt.items] == [4 + 4, 4 + 4, 4 + 4, 4 + 12]


def test_keep_all_is_bit_identical_with_regions() -> None:
    case = CASES["onevision"]()
    before = logits(case)
    strategy = tr.create_strategy("norm-topk", keep_ratio=1.0)
    with tr.attach(case.model, strategy, protect=REGIONS):
        assert torch.equal(logits(case), before)


def test_frames_that_are_dropped_take_their_regions_along() -> None:
    case = CASES["qwen3-vl"]()
    stages = [
        tr.Stage(reducer=tr.create_strategy("uniform", keep=1), site="frames"),
        tr.create_strategy("norm-topk", keep=1),
    ]
    with tr.attach(case.model, stages, protect=[(0, 0, 1, 0.5)]) as run:
        logits(case)
        clip = run.receipt.items[2]
    assert [stage.tokens_out for stage in clip.stages] == [4, 3]
    assert clip.stages[1].protected == 2


# -- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "regions",
    [
        "whole",
        (0, 0, 1, 1),
        [(0, 0, 1)],
        [(0, 0, 1, 2)],
        [(0.5, 0, 0.5, 1)],
        [(-0.1, 0, 1, 1)],
        [(0, 0, float("nan"), 1)],
        [(10, 10, 200, 60)],
        [(0, 0, 1, 1), [(0, 0, 1, 1)]],
    ],
)
def test_malformed_regions_are_refused_before_anything_is_touched(regions: Any) -> None:
    model = tiny_models.llava().model
    with pytest.raises(TokensError):
        tr.attach(model, tr.create_strategy("norm-topk", keep=4), protect=regions)
    tr.attach(model, tr.create_strategy("norm-topk", keep=4)).detach()


def test_tiles_of_unknown_place_are_refused() -> None:
    case = tiny_models.internvl()
    strategy = tr.create_strategy("norm-topk", keep=2)
    with (
        tr.attach(case.model, strategy, protect=REGIONS),
        pytest.raises(TokensError, match="how they cut tiles"),
    ):
        logits(case)


def test_an_untiled_image_of_internvl_is_served() -> None:
    case = tiny_models.internvl_single()
    strategy = tr.create_strategy("norm-topk", keep=1)
    with tr.attach(case.model, strategy, protect=REGIONS) as run:
        logits(case)
        [item] = run.reductions
    assert item.layout.protected.tolist() == [False, True, True, False]


def test_stages_inside_the_encoder_cannot_protect() -> None:
    # No family of this test serves that site, so the stage is put there by hand.
    case = tiny_models.llava()
    strategy = tr.create_strategy("norm-topk", keep=4)
    with tr.attach(case.model, strategy, protect=REGIONS) as run:
        run.stages = (tr.Stage(reducer=EveryOther(keep=4), site="vision"),)
        with pytest.raises(UnsupportedSite, match="inside the encoder"):
            logits(case)
