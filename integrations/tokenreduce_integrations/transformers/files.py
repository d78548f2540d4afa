"""Files beside a model's weights, in a folder or in a repository of the hub."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError

from tokenreduce.errors import PipelineError, did_you_mean

#: How a pruned encoder was cut, beside its weights.
PLAN_FILE = "surgery.json"
TESTBED = "testbed:"


def resolve_path(path: str) -> str:
    """The folder of a model that ships with this package, or the path as it is.

    Raises:
        PipelineError: if no such model ships.
    """
    if not path.startswith(TESTBED):
        return path
    from tokenreduce_integrations.testbed.models import MODEL_NAMES, VIDEO_MODEL_NAMES, model_path

    name, shipped = path.removeprefix(TESTBED), (*MODEL_NAMES, *VIDEO_MODEL_NAMES)
    if name not in shipped:
        raise PipelineError(
            f"model path {path!r}: there is no testbed model {name!r}. "
            f"{did_you_mean(path, [TESTBED + known for known in shipped])}"
        )
    return str(model_path(name))


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
