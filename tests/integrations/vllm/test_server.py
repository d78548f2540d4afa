"""A server with reduction: requests of several settings beside each other, bad ones, and clients
that hang up."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="needs an environment with vLLM: nox -s vllm")

from support import served_checkpoints
from support.served_checkpoints import clip, picture
from support.served_engines import answers, engine, overrides, requests
from support.served_http import Server, chat, image_part, server, video_part

# vLLM and what it imports warn of each other.
pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("ignore")]

NAME = "qwen2.5-vl"
FAMILY = served_checkpoints.FAMILIES[NAME]
#: Visual tokens of the picture, and how many each setting leaves of them.
TOKENS = 36
SETTINGS: list[tuple[dict[str, Any], int]] = [
    ({}, 9),
    ({"keep_ratio": 1}, TOKENS),
    ({"strategy": "tome", "keep": 8}, 8),
]
QUESTIONS = ("what?", "where is it?", "how many are there?", "who?")
LONG_QUESTION = "what is there to be seen, what of it moves, and what may be left out of it?"
PICTURE = image_part(picture(1))
MEGABYTE = 1 << 20
#: Tokens that the prefix cache keeps together.
BLOCK = 32


class OtherAnswer(Exception):
    """A prompt was answered in two ways."""


@pytest.fixture(scope="module")
def running(tmp_path_factory: Any) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    checkpoint = served_checkpoints.save(NAME, folder / "model")
    arguments = ["--trust-request-mm-kwargs", "--max-model-len", "1024", "--max-num-seqs", "32"]
    arguments += ["--block-size", str(BLOCK)]
    reduced = overrides(NAME, strategy="divprune", reduction=4)
    with server(checkpoint, folder / "log", *arguments, overrides=reduced) as started:
        yield started


def request(question: str, settings: dict[str, Any], **more: Any) -> dict[str, Any]:
    if settings:
        more["mm_processor_kwargs"] = {"tokenreduce": settings}
    return chat(question, PICTURE, **more)


def told(answer: dict[str, Any]) -> tuple[list[int], int]:
    """What was generated, and the length of the prompt."""
    return answer["choices"][0]["token_ids"], answer["usage"]["prompt_tokens"]


def test_two_hundred_requests_at_once_answer_as_each_alone(running: Server) -> None:
    kinds = [(question, *kind) for question in QUESTIONS for kind in SETTINGS]
    alone = [
        told(running.ask(request(question, settings)).json()) for question, settings, _ in kinds
    ]
    for (question, _, kept), (_, length) in zip(kinds, alone, strict=True):
        prompt = FAMILY.prompt(question, images=1)
        # One token for each byte of text, and the marks before and after the picture.
        assert length == len(prompt.replace(FAMILY.image, "")) + 2 + kept
    # The three settings do matter, so that answers of another one would be seen.
    assert len({tuple(ids) for ids, _ in alone[: len(SETTINGS)]}) == len(SETTINGS)
    order = [7 * i % len(kinds) for i in range(200)]
    asked = [request(*kinds[i][:2]) for i in order]
    assert [told(answer) for answer in running.ask_all(asked)] == [alone[i] for i in order]


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"strategy": "nonesuch"}, "unknown strategy"),
        ({"keep_ratio": 3}, "out of range"),
        ({"strategy": "fastv"}, "decoder"),
        ("divprune", "tokenreduce"),
    ],
)
def test_bad_settings_are_bad_requests(running: Server, settings: Any, reason: str) -> None:
    before = told(running.ask(request("what?", {})).json())
    response = running.ask(request("what?", settings))
    assert response.status_code == 400
    assert reason in response.text
    assert running.healthy()
    assert told(running.ask(request("what?", {})).json()) == before


def idle(running: Server) -> bool:
    return not running.metric("vllm:num_requests_running") + running.metric(
        "vllm:num_requests_waiting"
    )


def hang_up(running: Server, times: int) -> None:
    for i in range(times):
        settings, _ = SETTINGS[i % len(SETTINGS)]
        running.leave_early(request(QUESTIONS[i % len(QUESTIONS)], settings, tokens=600))
    end = time.monotonic() + 60
    while not idle(running):
        assert time.monotonic() < end, "requests of clients that left still run"
        time.sleep(0.1)


def test_clients_that_hang_up_leave_nothing_behind(running: Server) -> None:
    before = told(running.ask(request("what?", {})).json())
    hang_up(running, 60)
    warm = running.resident
    hang_up(running, 180)
    # A picture and its features are a few kilobytes; a request that stays would hold its cache.
    assert running.resident - warm < 32 * MEGABYTE
    assert running.metric("vllm:kv_cache_usage_perc") == 0
    assert told(running.ask(request("what?", {})).json()) == before


@pytest.mark.parametrize("settings", [settings for settings, _ in SETTINGS])
@pytest.mark.parametrize("part", [PICTURE, video_part(clip(3)[0])], ids=["image", "video"])
def test_a_prefix_from_the_cache_gives_the_same(
    running: Server, part: dict[str, Any], settings: dict[str, Any]
) -> None:
    kwargs = {"mm_processor_kwargs": {"tokenreduce": settings}} if settings else {}
    body = chat(LONG_QUESTION, part, cache_salt=f"{settings}", **kwargs)
    missed, hit = (running.ask(body).json() for _ in range(2))
    assert cached(missed) == 0
    # All but the last token, in whole blocks: everything visual, and text behind it.
    assert cached(hit) == (told(hit)[1] - 1) // BLOCK * BLOCK
    assert told(hit) == told(missed)


def cached(answer: dict[str, Any]) -> int:
    """Tokens of the prompt that came from the prefix cache."""
    details = answer["usage"]["prompt_tokens_details"] or {}
    return details.get("cached_tokens") or 0


@pytest.mark.xfail(
    strict=True,
    raises=OtherAnswer,
    reason="vLLM numbers tokens of a cached prefix as if the clip had not been pruned",
)
def test_comparison_a_prefix_from_the_cache_gives_the_same_with_evs(tmp_path: Path) -> None:
    """vLLM's own pruning of clips, whose runner for CPUs needs the worker that ours needs."""
    folder = served_checkpoints.save(NAME, tmp_path / "model")
    asked = {**requests(NAME)[2], "prompt": FAMILY.prompt(LONG_QUESTION, videos=1)}
    with engine(
        folder,
        video_pruning_rate=0.5,
        worker_cls="tokenreduce_integrations.vllm.worker.CPUWorker",
    ) as llm:
        missed, hit = (answers(llm, [asked])[0] for _ in range(2))
    assert missed.prompt_tokens == len(LONG_QUESTION) + len("user: \nassistant:") + 2 + 64 // 2
    assert (missed.cached, hit.cached) == (0, (hit.prompt_tokens - 1) // BLOCK * BLOCK)
    if hit.ids != missed.ids:
        raise OtherAnswer(f"{hit.ids} from the cache, {missed.ids} without it")
