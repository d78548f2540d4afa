"""Files beside a model's weights, in a folder or in a repository of the hub."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError


def find_file(path: str, name: str) -> Path | None:
    """A file beside a model's weights; None if there is none.

    Args:
        path: the model's folder or hub name; of the latter, the cache is asked before the hub.
        name: of the file.

    Raises:
        OSError: if the hub does not let it be read.
    """
    if Path(path).is_dir():
        file = Path(path) / name
        return file if file.is_file() else None
    try:
        return Path(hf_hub_download(path, name))
    except EntryNotFoundError:
        # Also without a connection: what the cache lacks was not there when the rest was fetched.
        return None
