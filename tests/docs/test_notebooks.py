"""The notebooks run, and say what their committed outputs say."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_notebooks_are_up_to_date() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "docs/notebooks.py"), "--check"],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
