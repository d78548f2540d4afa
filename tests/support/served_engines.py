"""Engines of vLLM on tiny checkpoints, and what they answer."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from support.served_checkpoints import FAMILIES, clip, picture

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

TOKENS = 6


@dataclass(frozen=True)
class Answer:
    """What a model made of a prompt.

    Attributes:
        prompt_tokens: length of its prompt as the LLM read it.
        ids: generated tokens.
        logprobs: of each of them.
        cached: tokens of the prompt that came from the prefix cache; None where there is none.
    """

    prompt_tokens: int
    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    cached: int | None = None


@contextmanager
def engine(folder: Path, **options: Any) -> Iterator[Any]:
    """An engine, gone afterwards.

    Args:
        folder: of the checkpoint.
        options: of ``vllm.LLM``.
    """
    from vllm import LLM

    settings: dict[str, Any] = {
        "enforce_eager": True,
        "dtype": "float32",
        "max_model_len": 1024,
        "max_num_seqs": 8,
        "block_size": 32,
        "limit_mm_per_prompt": {"image": 2, "video": 1},
        "disable_log_stats": True,
        "seed": 0,
        **options,
    }
    running = LLM(model=str(folder), **settings)
    try:
        yield running
    finally:
        running.llm_engine.engine_core.shutdown()


def overrides(name: str, **settings: Any) -> dict[str, Any]:
    """What opts a checkpoint into reduction.

    Args:
        name: of its family.
        settings: of the stage.
    """
    config = FAMILIES[name].config()
    import transformers

    architecture = transformers.AutoModelForImageTextToText._model_mapping[type(config)].__name__
    return {"architectures": [f"TokenReduce{architecture}"], "tokenreduce": settings}


def requests(name: str) -> list[dict[str, Any]]:
    """A wide picture, a square one, and a clip where the family takes clips."""
    family = FAMILIES[name]
    asked: list[dict[str, Any]] = [
        {
            "prompt": family.prompt("what?", images=1),
            "multi_modal_data": {"image": picture(1, 336, 112)},
        },
        {"prompt": family.prompt("where?", images=1), "multi_modal_data": {"image": picture(2)}},
    ]
    if family.video is not None:
        asked.append(
            {"prompt": family.prompt("when?", videos=1), "multi_modal_data": {"video": [clip(3)]}}
        )
    return asked


def answers(llm: Any, asked: Sequence[dict[str, Any]], **settings: Any) -> list[Answer]:
    """What an engine answers greedily.

    Args:
        llm: the engine.
        asked: the requests, served as one batch.
        settings: what each request says of its reduction.
    """
    from vllm import SamplingParams

    if settings:
        asked = [{**each, "mm_processor_kwargs": {"tokenreduce": settings}} for each in asked]
    sampling = SamplingParams(max_tokens=TOKENS, temperature=0, logprobs=1, ignore_eos=True)
    return [
        Answer(
            prompt_tokens=len(output.prompt_token_ids),
            ids=tuple(output.outputs[0].token_ids),
            logprobs=tuple(
                step[token].logprob
                for step, token in zip(
                    output.outputs[0].logprobs, output.outputs[0].token_ids, strict=True
                )
            ),
            cached=output.num_cached_tokens,
        )
        for output in llm.generate(list(asked), sampling, use_tqdm=False)
    ]
