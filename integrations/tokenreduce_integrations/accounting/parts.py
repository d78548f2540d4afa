"""The parts of a multimodal model that costs are told apart by."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

from torch import nn

from tokenreduce_integrations.pruning.encoders import ENCODER_PATHS
from tokenreduce_integrations.transformers.families import find_decoder, find_owner

ENCODER, PROJECTOR, SELECTION, LLM, HEAD = "encoder", "projector", "selection", "llm", "head"
PARTS = (ENCODER, PROJECTOR, SELECTION, LLM, HEAD)

#: Between encoder and LLM; some encoders hold theirs.
_PROJECTORS = (
    "multi_modal_projector",
    "language_projection",
    "qformer",
    "connector",
    "embed_vision",
    "merger",
    "deepstack_merger_list",
)


#: A part, and of the LLM the number of the layer.
Part = tuple[str, int | None]


class Listener(Protocol):
    """What is told of the parts as a model runs."""

    def enter(self, part: str, layer: int | None) -> None:
        """A part begins, inside whatever part was running."""
        ...

    def leave(self) -> None:
        """The innermost part ends."""
        ...


def modules_by_part(model: nn.Module) -> dict[nn.Module, Part]:
    """The modules that make up each part, and the number of the LLM's layer; none holds another
    of the same part.

    Everything else that runs in a model is the choice of tokens, which no module of its own does.
    """
    found: dict[nn.Module, Part] = {}
    decoder = find_decoder(model)
    for name, child in decoder.named_children():
        if name != "layers":
            found[child] = (LLM, None)
    for index, layer in enumerate(decoder.layers):
        found[layer] = (LLM, index)
    get_head: Any = model.get_output_embeddings
    if (head := get_head()) is not None:
        found[head] = (HEAD, None)
    if (encoder := find_tower(model)) is not None:
        found[encoder] = (ENCODER, None)
    for holder in (find_owner(model), encoder):
        for name in _PROJECTORS:
            module = getattr(holder, name, None)
            for part in module if isinstance(module, nn.ModuleList) else (module,):
                if isinstance(part, nn.Module):
                    found[part] = (PROJECTOR, None)
    return found


def find_tower(model: nn.Module) -> Any | None:
    """The vision encoder, or None."""
    for path in ENCODER_PATHS:
        try:
            return model.get_submodule(path)
        except AttributeError:
            continue
    return None


@contextmanager
def listening(parts: Mapping[nn.Module, Part], listener: Listener) -> Iterator[None]:
    """Tell a listener of the parts as they run, for as long as the context is open.

    Hooks that are on a module already run outside its part: they belong to an attachment.
    """
    handles = []
    for module, (part, layer) in parts.items():

        def before(_: nn.Module, __: Any, part: str = part, layer: int | None = layer) -> None:
            listener.enter(part, layer)

        def after(*_: Any) -> None:
            listener.leave()

        handles.append(module.register_forward_pre_hook(before))
        handles.append(module.register_forward_hook(after, prepend=True, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
