"""What vLLM is told to reduce: counts before the encoder runs, refusals, requests, identity."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import pytest

import tokenreduce as tr
from tokenreduce.errors import (
    BudgetError,
    PipelineError,
    ServingError,
    TokenReduceError,
    UnknownName,
)
from tokenreduce.plugins import installed
from tokenreduce.testing.subject import Subject, thinned, tiles, with_markers
from tokenreduce.tokens import Layout
from tokenreduce_integrations.vllm import settings
from tokenreduce_integrations.vllm.settings import SIGNALS, ServedStage

STRATEGIES = installed().strategies

WRAPPED: dict[str, Mapping[str, Any]] = {
    "per-frame": {"inner": {"strategy": "divprune"}},
    "per-frame, each its own": {"inner": {"strategy": "norm-topk", "keep": 3}},
    "per-frame of pools": {"inner": {"strategy": "avg-pool", "keep": 3}},
    "per-tile": {"inner": {"strategy": "uniform"}},
    "per-segment": {"frames": 2, "inner": {"strategy": "evs"}},
    "chain": {
        "reducers": [
            {"strategy": "uniform", "reduction": 2},
            {"strategy": "tome", "keep_ratio": 0.4},
        ]
    },
    "chain of wrappers": {
        "reducers": [
            {"strategy": "per-frame", "inner": {"strategy": "norm-topk", "keep": 4}},
            {"strategy": "divprune", "keep": 5},
        ]
    },
    "chain of chains": {
        "reducers": [
            {"strategy": "chain", "reducers": [{"strategy": "avg-pool", "keep": 9}]},
            {"strategy": "chain", "reducers": [{"strategy": "tome", "keep_ratio": 0.4}]},
        ]
    },
}
LAYOUTS = {
    "one token": Layout.from_grid((1, 1)),
    "odd image": Layout.from_grid((5, 7)),
    "row": Layout.from_grid((1, 13)),
    "clip": Layout.from_grid((3, 4, 4)),
    "odd clip": Layout.from_grid((5, 3, 7)),
    "tiles": tiles(),
    "thinned": thinned(),
    "markers": with_markers(Layout.from_grid((4, 5)), (4, 5)),
}
BUDGETS = ({"keep": 1}, {"keep": 7}, {"keep_ratio": 0.3}, {"reduction": "7/3"}, {"keep_ratio": 1})


def stages() -> Iterator[Any]:
    """Every registered strategy under every budget, every preset, and wrappers."""
    for name, record in STRATEGIES.items():
        if not record.wraps:
            for budget in BUDGETS:
                yield pytest.param({"strategy": name, **budget}, id=f"{name}-{budget}")
            yield pytest.param({"strategy": name}, id=f"{name}-alone")
        for preset in record.presets:
            yield pytest.param({"strategy": name, "preset": preset}, id=f"{name}@{preset}")
    for title, options in WRAPPED.items():
        name = title.replace(",", "").partition(" ")[0]
        stage = {"strategy": name, **options}
        yield pytest.param(stage, id=title)
        if name != "chain" and "keep" not in options["inner"]:
            yield pytest.param({**stage, "keep": 12}, id=f"{title} of 12")
            yield pytest.param({**stage, "keep_ratio": 0.01}, id=f"{title}, too little")


@pytest.mark.parametrize("stage", list(stages()))
def test_the_count_is_what_the_strategy_really_keeps_or_the_stage_is_refused(
    stage: dict[str, Any],
) -> None:
    try:
        served = ServedStage.from_config(stage)
    except TokenReduceError:
        return
    reducer = served.reducer()
    subject = Subject.of(reducer)
    for name, layout in LAYOUTS.items():
        try:
            expected = served.keep(layout)
        except ServingError:
            with pytest.raises(TokenReduceError):
                reducer(subject.with_all_signals(subject.tokens(layout)))
            continue
        for seed in range(2):
            tokens = subject.with_all_signals(subject.tokens(layout, seed=seed))
            assert reducer(tokens).kept == expected, name


@pytest.mark.parametrize("name", [n for n, record in STRATEGIES.items() if not record.wraps])
def test_a_strategy_is_served_or_refused_for_its_capabilities(name: str) -> None:
    record = STRATEGIES[name]
    able = "projector" in record.sites and not record.needs_weights and set(record.needs) <= SIGNALS
    if able:
        served = ServedStage.from_config({"strategy": name, "keep": 9})
        assert served.needs_query == ("prompt_embeddings" in record.needs)
    else:
        with pytest.raises(TokenReduceError):
            ServedStage.from_config({"strategy": name, "keep": 9})


REFUSED: tuple[tuple[dict[str, Any], str], ...] = (
    ({"strategy": "fastv", "preset": "official-k2-r50"}, "pages its cache"),
    ({"strategy": "tome", "site": "vision", "layer": 2, "keep": 9}, "encoders of its own"),
    ({"strategy": "uniform", "site": "frames", "keep": 9}, "taken the frames"),
    ({"strategy": "divprune", "keep": 9, "total": 20}, "total=20 is shared"),
    ({"strategy": "divprune", "total": 20}, "one by one"),
    ({"strategy": "divprune", "flops": 1e9}, "flops=1000000000.0 buys takes the model"),
    ({"strategy": "divprune", "prefill_ms": 5}, "prefill_ms"),
    ({"strategy": "dymu"}, "how many tokens dymu keeps depends on the picture"),
    ({"strategy": "sttm", "preset": "official"}, "before the encoder runs"),
    ({"strategy": "cdpruner", "keep": 9}, "'joint_text_embeddings': vLLM loads no text encoder"),
    (
        {"strategy": "denoising-schedule", "inner": {"strategy": "divprune"}, "keep": 9},
        "without denoising steps",
    ),
    (
        {
            "strategy": "chain",
            "reducers": [
                {"strategy": "divprune", "keep": 20},
                {"strategy": "per-frame", "inner": {"strategy": "uniform", "keep": 2}},
            ],
        },
        "depends on which ones the strategy before kept",
    ),
)


@pytest.mark.parametrize(("stage", "reason"), REFUSED)
def test_what_vllm_cannot_serve_is_refused_with_the_reason(
    stage: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ServingError, match="vLLM cannot serve") as refusal:
        ServedStage.from_config(stage)
    assert reason in str(refusal.value)


def test_every_reason_is_told() -> None:
    with pytest.raises(ServingError) as refusal:
        ServedStage.from_config({"strategy": "trim"})
    assert str(refusal.value).count("joint_") == 2
    assert "count: " in str(refusal.value)


def test_a_number_of_tokens_is_enough_where_their_places_do_not_matter() -> None:
    served = ServedStage.from_config({"strategy": "divprune", "keep_ratio": 0.3})
    assert [served.keep(n) for n in (0, 1, 2, 35)] == [0, 1, 1, 11]
    pooled = ServedStage.from_config({"strategy": "avg-pool", "keep": 4})
    assert pooled.keep(4) == 4
    with pytest.raises(ServingError, match="which this model's processor does not tell"):
        pooled.keep(5)
    assert pooled.keep(Layout.from_grid((5, 1))) == 4


MALFORMED: tuple[tuple[object, type[TokenReduceError], str], ...] = (
    ("divprune", ServingError, "must be a mapping"),
    ({"strategy": "divprun", "keep": 4}, UnknownName, "Did you mean 'divprune'"),
    ({"strategy": "divprune", "kep": 4}, PipelineError, "Did you mean 'keep'"),
    ({"strategy": "divprune"}, BudgetError, "has no budget"),
    ({"strategy": "divprune", "keep": 4, "modalities": ["vidoe"]}, ServingError, "'video'"),
    ({"strategy": "divprune", "keep": 4, "modalities": "image"}, ServingError, "must list"),
    ({"strategy": "divprune", "keep": 4, "query": "dog"}, ServingError, "compares with no text"),
    ({"strategy": "mmtok", "keep": 4, "query": "  "}, ServingError, "must be a text"),
    ({"strategy": "divprune", "keep": Layout}, ServingError, "what JSON can hold"),
    ({"strategy": "divprune", "keep": "${oc.env:HOME}"}, PipelineError, "calls a resolver"),
    ({"strategy": "token-grouping", "keep": 4}, PipelineError, "give weights="),
)


@pytest.mark.parametrize(("given", "kind", "message"), MALFORMED)
def test_malformed_settings_stop_the_server(
    given: object, kind: type[TokenReduceError], message: str
) -> None:
    with pytest.raises(kind, match=re.escape(message)):
        ServedStage.from_config(given)


SERVER = ServedStage.from_config({"strategy": "tome", "keep_ratio": 0.25})


def test_a_request_changes_budget_strategy_and_options() -> None:
    assert SERVER.for_request() is SERVER
    assert SERVER.for_request({}).digest == SERVER.digest
    assert SERVER.for_request({"keep": 7}).keep(100) == 7
    other = SERVER.for_request({"strategy": "divprune"})
    assert (other.reducer().name, other.keep(100)) == ("divprune", 25)
    visionzip = SERVER.for_request({"strategy": "visionzip", "preset": "official-64"})
    assert visionzip.reducer() == tr.create_strategy("visionzip", preset="official-64")
    random = ServedStage.from_config({"strategy": "random", "keep": 4, "seed": 3})
    assert random.for_request({"reduction": 2}).reducer() == tr.create_strategy(
        "random", reduction=2, seed=3
    )
    video = ServedStage.from_config({"strategy": "tome", "keep": 4, "modalities": ["video"]})
    assert video.for_request({"keep": 7}).modalities == ("video",)


BAD_REQUESTS: tuple[tuple[object, str], ...] = (
    ("divprune", "must be a mapping"),
    ({"keep": 0}, "keep=0"),
    ({"keep": -1}, "out of range"),
    ({"keep_ratio": float("nan")}, "what JSON can hold"),
    ({"keep": 4, "reduction": 2}, "two budgets at once"),
    ({"strategy": "nothing"}, "unknown strategy"),
    ({"strategy": "fastv"}, "does not run at the site 'projector'"),
    ({"strategy": "trim"}, "vLLM cannot serve trim"),
    ({"site": "decoder"}, "site is the server's to say"),
    ({"modalities": ["image"]}, "modalities is the server's to say"),
    ({"total": 5}, "total is the server's to say"),
    ({"query": 3}, "must be a text"),
    ({"query": "x" * 5000}, "5000 characters"),
    ({"query": "a dog"}, "compares with no text"),
    ({"strategy": "token-grouping", "weights": "/etc/passwd"}, "reads a file of the server"),
    ({"strategy": "mmtok"}, "give the text as"),
    ({"strategy": "random", "seed": "${vars.x}"}, "mm_processor_kwargs"),
)


@pytest.mark.parametrize(("given", "message"), BAD_REQUESTS)
def test_a_request_that_cannot_be_served_is_a_value_error(given: object, message: str) -> None:
    with pytest.raises(ServingError, match=re.escape(message)):
        SERVER.for_request(given)


def test_prompt_aware_strategies_take_the_text_of_the_request() -> None:
    server = ServedStage.from_config({"strategy": "mmtok", "keep": 4})
    with pytest.raises(ServingError, match="compares the picture with a text"):
        server.for_request()
    dog, cat = (server.for_request({"query": word}) for word in ("dog", "cat"))
    assert len({server.digest, dog.digest, cat.digest}) == 3
    assert dog.with_query_ids([5, 6]).digest == dog.digest
    assert ServedStage.from_json(dog.with_query_ids([5, 6]).to_json()).query_ids == (5, 6)
    with pytest.raises(ServingError, match="has no tokens"):
        dog.with_query_ids([])
    standing = ServedStage.from_config({"strategy": "mmtok", "keep": 4, "query": "dog"})
    assert standing.for_request().digest == dog.digest
    assert standing.for_request({"query": "cat"}).digest == cat.digest
    # Another strategy, which reads no text, does not inherit it.
    assert standing.for_request({"strategy": "tome"}).query is None


def test_the_worker_is_told_everything() -> None:
    for stage in ({"strategy": "random", "reduction": "7/3", "seed": 9}, WRAPPED_STAGE):
        served = ServedStage.from_config({**stage, "modalities": ["image"]})
        text = served.to_json()
        assert "\n" not in text
        assert ServedStage.from_json(text) == served
        assert ServedStage.from_json(text).to_json() == text
    altered = json.loads(text) | {"digest": "0" * 16}
    with pytest.raises(ServingError, match="different versions"):
        ServedStage.from_json(json.dumps(altered))


WRAPPED_STAGE = {"strategy": "per-frame", "keep": 12, "inner": {"strategy": "divprune"}}


def test_equal_settings_have_one_digest_in_every_process() -> None:
    stages: tuple[dict[str, Any], ...] = (
        {"strategy": "tome", "keep_ratio": 0.25},
        {
            "keep_ratio": 0.25,
            "strategy": "tome",
            "site": "projector",
            "modalities": ["image", "video"],
        },
    )
    assert len({ServedStage.from_config(stage).digest for stage in stages}) == 1
    others = ({"keep": 9}, {"modalities": ["image"]}, {"strategy": "divprune"})
    digests = {
        ServedStage.from_config({**stages[0], "keep_ratio": None, "keep": 3, **o}).digest
        for o in others
    }
    assert len(digests | {SERVER.digest}) == 4
    code = (
        "import sys; from tokenreduce_integrations.vllm.settings import ServedStage\n"
        "print(ServedStage.from_config({'strategy': 'tome', 'keep_ratio': 0.25}).digest)\n"
        "assert not {'vllm', 'transformers'} & set(sys.modules), 'is to need neither'"
    )
    shown = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONHASHSEED": "1"},
    )
    assert shown.stdout.strip() == SERVER.digest


def test_versions_are_part_of_the_digest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings, "__version__", "0.0.1")
    fresh = ServedStage.from_config({"strategy": "tome", "keep_ratio": 0.25})
    assert fresh.digest != SERVER.digest
