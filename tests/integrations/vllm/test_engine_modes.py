"""How an engine runs changes nothing of what it answers: chunks, workers, graphs, types."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="needs an environment with vLLM: nox -s vllm")

from support import served_checkpoints
from support.served_engines import Answer, answers, engine, overrides, requests

# vLLM and what it imports warn of each other.
pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("ignore")]

#: A strategy that reads the tower where it has a class token, else features alone.
SETTINGS = {
    "llava": {"strategy": "visionzip", "reduction": 2},
    "qwen2-vl": {"strategy": "divprune", "reduction": 2},
    "qwen2.5-vl": {"strategy": "divprune", "reduction": 2},
    "qwen3-vl": {"strategy": "divprune", "reduction": 2},
}
MODES: dict[str, dict[str, Any]] = {
    # Media are split over several steps.
    "chunks": {"max_num_batched_tokens": 32},
    "no cache": {"enable_prefix_caching": False, "mm_processor_cache_gb": 0},
    "two workers": {"tensor_parallel_size": 2},
    "compiled": {"enforce_eager": False},
    "in process": {},
}


def run(folder: Path, name: str, **options: Any) -> list[Answer]:
    asked = requests(name)
    with engine(folder, hf_overrides=overrides(name, **SETTINGS[name]), **options) as llm:
        return [*answers(llm, asked), *answers(llm, asked)]


@pytest.fixture(scope="module", params=SETTINGS)
def plain(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path, list[Answer]]:
    """A family, its checkpoint, and what it answers in the usual mode."""
    name = request.param
    folder = served_checkpoints.save(name, tmp_path_factory.mktemp("modes") / name)
    return name, folder, run(folder, name)


@pytest.mark.parametrize(
    ("plain", "mode"),
    [
        ("llava", "two workers"),
        ("qwen2.5-vl", "chunks"),
        ("qwen2.5-vl", "no cache"),
        ("qwen2.5-vl", "two workers"),
        ("qwen2-vl", "compiled"),
        ("qwen3-vl", "chunks"),
        ("qwen3-vl", "in process"),
    ],
    indirect=["plain"],
)
def test_modes_answer_alike(
    plain: tuple[str, Path, list[Answer]], mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, folder, expected = plain
    if mode == "two workers":
        monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    if mode == "in process":
        monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    given = run(folder, name, **MODES[mode])
    for ours, theirs in zip(given, expected, strict=True):
        assert ours.prompt_tokens == theirs.prompt_tokens
        assert ours.ids == theirs.ids
        assert ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-3)
