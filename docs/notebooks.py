"""Run the notebooks of the documentation and write them with their outputs.

python docs/notebooks.py          # run and write
python docs/notebooks.py --check  # run, and fail if anything but a measurement came out otherwise
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent.parent / "examples/notebooks"
TIMEOUT = 300
#: What differs between machines: times, and shares of right answers by a question or two.
MEASURED = re.compile(r"\d+(\.\d+)?( ms|%)")


def read(path: Path) -> Any:
    """A notebook, as ``nbformat`` reads it."""
    import nbformat

    return nbformat.reads(path.read_text(encoding="utf-8"), as_version=4)  # type: ignore[no-untyped-call]


def run(path: Path) -> Any:
    """The notebook with fresh outputs: what was printed and what cells returned, no warnings."""
    from nbclient import NotebookClient

    os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1")
    notebook = read(path)
    NotebookClient(notebook, timeout=TIMEOUT, coalesce_streams=True).execute()
    for cell in notebook.cells:
        cell.metadata = {}
        if cell.cell_type != "code":
            continue
        cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
        for output in cell.outputs:
            output.get("data", {}).pop("image/jpeg", None)
    notebook.metadata["language_info"] = {"name": "python"}
    return notebook


def said(notebook: Any) -> list[str]:
    """What each cell printed and returned as text, without what was measured."""
    found = []
    for cell in notebook.cells:
        outputs = cell.get("outputs", ())
        texts = (o.get("text", "") + o.get("data", {}).get("text/plain", "") for o in outputs)
        found.append(MEASURED.sub("-", "".join(texts)))
    return found


def main() -> None:
    import nbformat

    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing, fail if out of date")
    check = parser.parse_args().check
    stale = []
    for path in sorted(FOLDER.glob("*.ipynb")):
        fresh = run(path)
        if said(fresh) == said(read(path)):
            continue
        stale.append(path.name)
        if not check:
            path.write_text(nbformat.writes(fresh) + "\n", encoding="utf-8")  # type: ignore[no-untyped-call]
    if check and stale:
        sys.exit(f"out of date: {', '.join(stale)}. Run: python docs/notebooks.py")


if __name__ == "__main__":
    main()
