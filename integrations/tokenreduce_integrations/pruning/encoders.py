"""Where the heads and the MLP channels of a vision encoder are."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from tokenreduce.errors import UnsupportedModel

_OWNED_AS = ("vision_tower", "visual", "vision_model")
#: Where a model may hold its vision encoder.
ENCODER_PATHS = tuple(f"{owner}{name}" for owner in ("model.", "") for name in _OWNED_AS)
_ATTENTION = ("self_attn", "attn", "attention")
_MLP = ("mlp",)


@dataclass(frozen=True, kw_only=True)
class Part:
    """Linear layers that write channels, and one that reads them: an MLP, or attention's heads.

    Attributes:
        path: of the module, in the encoder.
        writers: names of the linear layers whose outputs are the channels.
        reader: name of the linear layer that reads them.
        channels: how many there are.
        group: channels that only leave together: 1, or the size of a head.
        fused: how many times each writer's outputs hold the channels (3 where queries, keys and
            values come from one layer).
        norms: names of the modules with one parameter for each channel.
        counts: attributes that hold the number of groups.
        widths: attributes that hold the number of channels.
    """

    path: str
    writers: tuple[str, ...]
    reader: str
    channels: int
    group: int = 1
    fused: int = 1
    norms: tuple[str, ...] = ()
    counts: tuple[str, ...] = ()
    widths: tuple[str, ...] = ()

    @property
    def groups(self) -> int:
        """How many groups of channels there are."""
        return self.channels // self.group


@dataclass(frozen=True, kw_only=True)
class Block:
    """One block of an encoder; a part of a form that is not known is None."""

    module: Any
    attention: Part | None
    mlp: Part | None


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """The vision encoder of a model.

    Attributes:
        path: in the model.
        module: the encoder.
        owner: path in the model of the module that owns it.
        blocks_path: path in the encoder of the list of blocks.
        blocks: the blocks, in order.
    """

    path: str
    module: Any
    owner: str
    blocks_path: str
    blocks: tuple[Block, ...]


@dataclass(frozen=True)
class _Form:
    writers: tuple[str, ...]
    reader: str
    fused: int = 1


_HEAD_FORMS = (
    _Form(("q_proj", "k_proj", "v_proj"), "out_proj"),
    _Form(("q_proj", "k_proj", "v_proj"), "projection_layer"),
    _Form(("qkv",), "proj", fused=3),
)
_MLP_FORMS = (
    _Form(("fc1",), "fc2"),
    _Form(("linear_fc1",), "linear_fc2"),
    _Form(("gate_proj", "up_proj"), "down_proj"),
)


def find_encoder(model: nn.Module) -> Encoder:
    """The vision encoder of a multimodal model.

    Raises:
        UnsupportedModel: if there is none whose blocks can be told.
    """
    for path in ENCODER_PATHS:
        try:
            encoder = model.get_submodule(path)
        except AttributeError:
            continue
        blocks_path, blocks = _find_blocks(path, encoder)
        return Encoder(
            path=path,
            module=encoder,
            owner=path.rpartition(".")[0],
            blocks_path=blocks_path,
            blocks=blocks,
        )
    raise UnsupportedModel(
        f"{type(model).__name__} has no vision encoder under the names {', '.join(_OWNED_AS)}: it "
        "cannot be pruned. Leave out vision_encoder."
    )


def picture_size(config: Any) -> tuple[int, int] | None:
    """Height and width of the pictures that an encoder takes; None if it takes any."""
    size = getattr(config, "image_size", None)
    if size is None:
        size = (config.to_dict().get("model_args") or {}).get("img_size")
    if size is None:
        return None
    height, width = (size, size) if isinstance(size, int) else size
    return int(height), int(width)


def _find_blocks(path: str, encoder: nn.Module) -> tuple[str, tuple[Block, ...]]:
    for name, modules in encoder.named_modules():
        if isinstance(modules, nn.ModuleList | nn.Sequential) and len(modules):
            found = [_first(block, _ATTENTION) and _first(block, _MLP) for block in modules]
            if all(found):
                return name, tuple(
                    Block(
                        module=block,
                        attention=_part(f"{name}.{i}", block, _ATTENTION, _HEAD_FORMS),
                        mlp=_part(f"{name}.{i}", block, _MLP, _MLP_FORMS),
                    )
                    for i, block in enumerate(modules)
                )
    raise UnsupportedModel(
        f"{path} ({type(encoder).__name__}) has no list of blocks with attention and an MLP: its "
        "blocks, heads and channels cannot be told. The backend torch_pruning follows the "
        "computation of any encoder that takes pictures."
    )


def _first(block: nn.Module, names: tuple[str, ...]) -> str:
    held = (name for name in names if isinstance(getattr(block, name, None), nn.Module))
    return next(held, "")


def _part(
    prefix: str, block: nn.Module, names: tuple[str, ...], forms: tuple[_Form, ...]
) -> Part | None:
    """A part of a block; None if its form is not known to the last parameter."""
    name = _first(block, names)
    module: Any = getattr(block, name)
    for form in forms:
        layers: list[Any] = [getattr(module, layer, None) for layer in (*form.writers, form.reader)]
        if all(isinstance(layer, nn.Linear) for layer in layers):
            break
    else:
        return None
    *writers, reader = layers
    channels = reader.in_features
    if any(writer.out_features != form.fused * channels for writer in writers):
        return None
    heads = getattr(module, "num_heads", None) if forms is _HEAD_FORMS else channels
    if not heads or channels % heads:
        return None
    group = channels // heads
    norms, extra_writers = [], []
    for child, parameters in _further(module, {*form.writers, form.reader}):
        sizes = {parameter.shape[0] for parameter in parameters}
        if sizes == {channels} and all(parameter.ndim == 1 for parameter in parameters):
            norms.append(child)
        elif sizes == {channels} and isinstance(getattr(module, child), nn.Linear):
            extra_writers.append(child)
        elif sizes != {group} or forms is not _HEAD_FORMS:
            return None
    if extra_writers and form.fused > 1:
        # A gate is written once, next to queries, keys and values in one layer.
        return None
    named = ("num_heads",) if forms is _HEAD_FORMS else ()
    widths = ("embed_dim", "attn_dim") if forms is _HEAD_FORMS else ()
    return Part(
        path=f"{prefix}.{name}",
        writers=(*form.writers, *extra_writers),
        reader=form.reader,
        channels=channels,
        group=group,
        fused=form.fused,
        norms=tuple(norms),
        counts=tuple(attribute for attribute in named if hasattr(module, attribute)),
        widths=tuple(w for w in widths if getattr(module, w, None) == channels),
    )


def _further(module: nn.Module, known: set[str]) -> Iterator[tuple[str, list[nn.Parameter]]]:
    """Everything else in a module that has parameters; its own count as a child without a name."""
    own = list(module.parameters(recurse=False))
    if own:
        yield "", own
    for name, child in module.named_children():
        parameters = list(child.parameters())
        if parameters and name not in known:
            yield name, parameters
