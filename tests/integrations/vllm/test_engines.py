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

# vLLM and what it imports warn of each other.
pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("ignore")]

SETTINGS = {"strategy": "divprune", "reduction": 4}
#: Visual tokens of each request, and how many of them stay in any case.
TOKENS: dict[str, list[tuple[int, int]]] = {
    "llava": [(144, 0), (144, 0)],
    "llava-next": [(88, 4), (192, 12)],
    "onevision": [(88, 4), (192, 12), (73, 1)],
    "internvl": [(64, 0), (80, 0), (128, 0)],
    "qwen2-vl": [(48, 0), (36, 0), (64, 0)],
    "qwen2.5-vl": [(48, 0), (36, 0), (64, 0)],
    "qwen3-vl": [(40, 0), (25, 0), (64, 0)],
}

WITH_CLASS_TOKEN = frozenset({"llava", "llava-next", "internvl"})


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


@pytest.fixture(scope="module", params=TOKENS)
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
    for answer, plain, (tokens, protected) in zip(
        given, served.plain, TOKENS[served.name], strict=True
    ):
        dropped = tokens - protected - tr.Budget(reduction=4).count(tokens - protected)
        assert answer.prompt_tokens == plain.prompt_tokens - dropped


@pytest.mark.parametrize("reduction", [2, 4])
@pytest.mark.parametrize("strategy", ["divprune", "tome"])
def test_reduced_prompts_are_answered_as_by_transformers(
    served: Served, strategy: str, reduction: int
) -> None:
    reference = Reference(served.folder, served.name)
    reducer = tr.create_strategy(strategy, reduction=reduction)
    asked = requests(served.name)
    expected = [reference.answer(each, reducer) for each in asked]
    given = answers(served.llm, asked, strategy=strategy, reduction=reduction)
    same(given, expected, tolerance=2e-4)


@pytest.mark.parametrize(
    "strategy", ["fastervlm", "visionzip", "rank-fusion", "vscan", "greedyprune"]
)
def test_signals_are_those_of_transformers(served: Served, strategy: str) -> None:
    reducer = tr.create_strategy(strategy, reduction=2)
    asked = requests(served.name)
    if not WITH_CLASS_TOKEN.issuperset({served.name}) and strategy != "greedyprune":
        with pytest.raises(ValueError, match="class_attention"):
            answers(served.llm, asked, strategy=strategy, reduction=2)
        return
    if strategy == "vscan" and served.name != "llava":
        with pytest.raises(ValueError, match="grid"):
            answers(served.llm, asked, strategy=strategy, reduction=2)
        return
    reference = Reference(served.folder, served.name)
    for each in asked:
        family = served_checkpoints.FAMILIES[served.name]
        query = each["prompt"].replace(family.image, "").replace(family.video or family.image, "")
        own = {"query": query} if strategy == "greedyprune" else {}
        expected = reference.attached_answer(each, reducer)
        given = answers(served.llm, [each], strategy=strategy, reduction=2, **own)
        same(given, [expected], tolerance=2e-4)


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
    tokens, protected = TOKENS[served.name][1]
    dropped = tokens - protected - tr.Budget(reduction=2).count(tokens - protected)
    assert whole.prompt_tokens - halved.prompt_tokens == 2 * dropped
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
