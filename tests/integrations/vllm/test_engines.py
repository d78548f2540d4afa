"""Models that vLLM serves with reduction answer as unmodified ones, and as transformers does."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="needs an environment with vLLM: nox -s vllm")

import tokenreduce as tr
from support import served_checkpoints
from support.served_engines import Answer, answers, engine, overrides, requests
from support.served_reference import Reference
from tokenreduce.tokens import Layout

# vLLM and what it imports warn of each other.
pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("ignore")]

SETTINGS = {"strategy": "divprune", "reduction": 4}
#: Visual tokens of each request, and layout and frames (time, rows, columns) of them.
ITEMS: dict[str, list[tuple[int, Layout, list[tuple[int, int, int]]]]] = {
    "llava": [(144, Layout.from_grid((12, 12)), [])] * 2,
    "qwen2.5-vl": [
        (48, Layout.from_grid((4, 12)), [(0, 4, 12)]),
        (36, Layout.from_grid((6, 6)), [(0, 6, 6)]),
        (64, Layout.from_grid((4, 4, 4)), [(time, 4, 4) for time in (0, 2, 4, 6)]),
    ],
}


@dataclass(frozen=True)
class Served:
    """A family on two engines.

    Attributes:
        name: of the family.
        folder: of its checkpoint.
        plain: what the unmodified model answers.
        llm: the engine with reduction.
    """

    name: str
    folder: Path
    plain: list[Answer]
    llm: Any


@pytest.fixture(scope="module", params=ITEMS)
def served(request: pytest.FixtureRequest, tmp_path_factory: Any) -> Iterator[Served]:
    name = request.param
    folder = served_checkpoints.save(name, tmp_path_factory.mktemp("served") / name)
    with engine(folder) as llm:
        plain = answers(llm, requests(name))
    with engine(folder, hf_overrides=overrides(name, **SETTINGS)) as llm:
        yield Served(name, folder, plain, llm)


def same(ours: list[Answer], theirs: list[Answer], tolerance: float = 0) -> None:
    for one, other in zip(ours, theirs, strict=True):
        assert one.prompt_tokens == other.prompt_tokens
        assert one.ids == other.ids
        assert one.logprobs == pytest.approx(other.logprobs, abs=tolerance)


def test_keeping_all_is_the_unmodified_model(served: Served) -> None:
    same(answers(served.llm, requests(served.name), keep_ratio=1), served.plain)


def test_prompts_shrink_as_computed(served: Served) -> None:
    given = answers(served.llm, requests(served.name))
    for answer, plain, (tokens, layout, _) in zip(
        given, served.plain, ITEMS[served.name], strict=True
    ):
        kept = (tokens - layout.protected_count) // 4 + layout.protected_count
        assert answer.prompt_tokens == plain.prompt_tokens - tokens + kept


@pytest.mark.parametrize("strategy", ["divprune", "tome"])
def test_reduced_prompts_are_answered_as_by_transformers(served: Served, strategy: str) -> None:
    reference = Reference(served.folder, served.name)
    reducer = tr.create_strategy(strategy, reduction=2)
    asked = requests(served.name)
    expected = [
        reference.answer(each, reducer, lambda _, layout=layout: layout, frames)
        for each, (_, layout, frames) in zip(asked, ITEMS[served.name], strict=True)
    ]
    same(answers(served.llm, asked, strategy=strategy, reduction=2), expected, tolerance=2e-4)


def test_requests_of_several_settings_are_served_side_by_side(served: Served) -> None:
    asked = requests(served.name)
    kinds: list[dict[str, Any]] = [{}, {"keep_ratio": 0.5}, {"strategy": "tome", "keep": 8}]
    alone = [answers(served.llm, [each], **kind)[0] for kind in kinds for each in asked]
    mixed = [
        {**each, "mm_processor_kwargs": {"tokenreduce": kind}} if kind else each
        for kind in kinds
        for each in asked
    ]
    together = answers(served.llm, mixed)
    same(together, alone, tolerance=1e-5)
    # All came a second time, so their prefixes were at hand.
    assert all(answer.cached for answer in together if answer.prompt_tokens > 32)


def test_another_question_about_cached_media(served: Served) -> None:
    first = requests(served.name)[0]
    other = {**first, "prompt": first["prompt"].replace("what?", "what is there to be seen?")}
    fresh = {**other, "cache_salt": "nothing in common"}
    answers(served.llm, [first])
    (hit,) = answers(served.llm, [other])
    (miss,) = answers(served.llm, [fresh])
    assert not miss.cached
    same([hit], [miss], tolerance=1e-5)


def test_two_items_of_a_prompt(served: Served) -> None:
    family = served_checkpoints.FAMILIES[served.name]
    images = [served_checkpoints.picture(seed) for seed in (1, 2)]
    asked = {
        "prompt": family.prompt("which?", images=2),
        "multi_modal_data": {"image": images},
    }
    (whole,) = answers(served.llm, [asked], keep_ratio=1)
    (halved,) = answers(served.llm, [asked], keep_ratio=0.5)
    (again,) = answers(served.llm, [asked], keep_ratio=0.5)
    tokens, layout, _ = ITEMS[served.name][1]
    assert whole.prompt_tokens - halved.prompt_tokens == (tokens - layout.protected_count)
    same([again], [halved], tolerance=1e-5)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"strategy": "nonesuch"}, "unknown strategy"),
        ({"keep_ratio": 3}, "out of range"),
        ({"strategy": "fastv"}, "decoder"),
        ({"strategy": "mmtok"}, "query"),
        ({"modalities": ["image"]}, "the server's to say"),
    ],
)
def test_bad_settings_are_refused_and_the_engine_lives_on(
    served: Served, settings: dict[str, Any], reason: str
) -> None:
    asked = requests(served.name)[:1]
    with pytest.raises(ValueError, match=reason):
        answers(served.llm, asked, **settings)
    same(answers(served.llm, asked, keep_ratio=1), served.plain[:1])
