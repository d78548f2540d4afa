"""``import tokenreduce`` must stay quick, and must not pull in what the core does not know."""

import json
import subprocess
import sys

import pytest

MOST_SECONDS = 0.060
FOREIGN = ("transformers", "faiss", "timm", "torchvision", "PIL", "typer", "rich")

IMPORT = f"""
import json, sys, time
import torch
started = time.perf_counter()
import tokenreduce
elapsed = time.perf_counter() - started
foreign = [name for name in {FOREIGN!r} if name in sys.modules]
print(json.dumps([elapsed, foreign]))
"""


def python(code: str) -> str:
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    ).stdout


def test_importing_takes_no_time() -> None:
    # The best of several says what the import costs; the others, what else the machine did.
    best = float("inf")
    for _ in range(5):
        seconds, foreign = json.loads(python(IMPORT))
        assert foreign == []
        best = min(best, seconds)
        if best <= MOST_SECONDS:
            break
    assert best <= MOST_SECONDS


def test_the_bare_import_needs_no_torch() -> None:
    assert python("import sys, tokenreduce; print('torch' in sys.modules)").strip() == "False"


def test_the_whole_core_knows_no_model_library() -> None:
    code = f"""
import sys, tokenreduce
for name in tokenreduce.__all__:
    getattr(tokenreduce, name)
tokenreduce.create_strategy("norm-topk", keep=1)
print([name for name in {FOREIGN!r} if name in sys.modules])
"""
    assert python(code).strip() == "[]"


def test_every_public_name_exists() -> None:
    import tokenreduce

    for name in tokenreduce.__all__:
        assert getattr(tokenreduce, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'no_such_name'"):
        _ = tokenreduce.no_such_name
