"""Peak memory does not grow with the length of a clip."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from support.qwen_files import save_model, shapes, write_clip

pytest.importorskip("av", reason="the extra 'video' is missing")

CHILD = """
import resource, sys
from tokenreduce_integrations.cli.app import app
app(sys.argv[1:], standalone_mode=False)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr)
"""


@pytest.mark.slow
def test_ten_minutes_need_no_more_memory_than_one(tmp_path) -> None:
    """720p at five frames a second, of which one a second is encoded: 358,800 tokens."""
    files = save_model(tmp_path / "model", pixels=1 << 20)
    pipeline = tmp_path / "pipeline.yaml"
    pipeline.write_text(f"model: {{path: {files}}}\nreduce: [{{strategy: lftr, keep: 1024}}]\n")
    peaks, tokens = [], []
    for minutes in (1, 10):
        pictures = shapes(300 * minutes, 720, 1280, cut=60)
        clip = write_clip(tmp_path / f"{minutes}.mp4", pictures)
        asked = ["run", str(pipeline), str(clip), "what moves here", "--fps", "1", "--json"]
        done = subprocess.run(
            [sys.executable, "-c", CHILD, *asked, "--max-new-tokens", "4"],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        receipt = json.loads(done.stdout)["receipt"]
        assert receipt["tokens_out"] == 1024
        tokens.append(receipt["tokens_in"])
        peaks.append(int(done.stderr.split()[-1]))
    print(f"tokens {tokens}, peaks {peaks} KiB, ratio {peaks[1] / peaks[0]:.3f}")
    assert tokens[1] == 10 * tokens[0]
    assert peaks[1] <= 1.1 * peaks[0]
