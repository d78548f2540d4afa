"""Peak memory does not grow with the length of a clip."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from support.clip_models import clip_model
from support.qwen_files import shapes, write_clip

pytest.importorskip("av", reason="the extra 'video' is missing")

CHILD = """
import resource, sys
from tokenreduce_integrations.cli.app import app
app(sys.argv[1:], standalone_mode=False)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr)
"""


MINUTES = (1, 10)


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> list[Path]:
    """720p at five frames a second."""
    folder = tmp_path_factory.mktemp("clips")
    return [
        write_clip(folder / f"{minutes}.mp4", shapes(300 * minutes, 720, 1280, cut=60))
        for minutes in MINUTES
    ]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen2.5-vl", "qwen3-vl", "llava-onevision", "internvl"])
def test_ten_minutes_need_no_more_memory_than_one(tmp_path, clips, name) -> None:
    """One frame a second is encoded: 358,800 tokens for Qwen."""
    model, processor = clip_model(name)
    if name.startswith("qwen"):
        # Frames as large whatever the length of the clip.
        pixels = 1 << 20 if name == "qwen2.5-vl" else 1 << 40
        processor.video_processor.size = {"shortest_edge": 1, "longest_edge": pixels}
    for part in (model, processor):
        part.save_pretrained(tmp_path / "model")
    pipeline = tmp_path / "pipeline.yaml"
    pipeline.write_text(
        f"model: {{path: {tmp_path / 'model'}}}\nreduce: [{{strategy: lftr, keep: 64}}]\n"
    )
    peaks, tokens = [], []
    for clip in clips:
        asked = ["run", str(pipeline), str(clip), "what moves here", "--fps", "1", "--json"]
        done = subprocess.run(
            [sys.executable, "-c", CHILD, *asked, "--max-new-tokens", "4"],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        receipt = json.loads(done.stdout)["receipt"]
        tokens.append(receipt["tokens_in"])
        peaks.append(int(done.stderr.split()[-1]))
    print(f"{name}: tokens {tokens}, peaks {peaks} KiB, ratio {peaks[1] / peaks[0]:.3f}")
    assert tokens[1] >= 9.9 * tokens[0]
    assert peaks[1] <= 1.1 * peaks[0]
