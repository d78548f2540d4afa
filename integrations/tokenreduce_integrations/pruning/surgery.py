"""Surgery plans: what was cut out of a vision encoder, as data that can be saved and done again.

A plan says which blocks, which rows and columns of which weights stay, and which attributes and
settings change with them. It is written beside the weights, so that shapes which no configuration
can express load again: the model is built as its configuration says, cut, and then filled.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tokenreduce.errors import AttachmentError, PipelineError, UnsupportedModel
from tokenreduce_integrations.transformers.attachment import attachment_of
from tokenreduce_integrations.transformers.families import find_decoder

PLAN_FILE = "surgery.json"
FORMAT = 1

_ATTRIBUTE = "_tokenreduce_surgery"


@dataclass(frozen=True, kw_only=True)
class Slice:
    """The rows and columns of a module's weights that stay.

    Attributes:
        rows: of every parameter (outputs of a linear layer, channels of a norm); None for all.
        columns: of its weight (inputs of a linear layer); None for all.
    """

    rows: tuple[int, ...] | None = None
    columns: tuple[int, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A value that the surgery changes in the model's configuration.

    Attributes:
        path: attributes that lead from the model to the object, as ``"config.vision_config"``.
        name: the attribute.
        before: its value in the whole model.
        after: its value in the pruned one.
    """

    path: str
    name: str
    before: Any
    after: Any


@dataclass(frozen=True, kw_only=True)
class SurgeryPlan:
    """What stays of a vision encoder.

    Attributes:
        encoder: path of the encoder in the model.
        blocks: path of its list of blocks in the encoder.
        kept: indices of the blocks that stay.
        slices: by path in the whole encoder, before any block leaves.
        attributes: by path in the whole encoder, the attributes that say how wide a module is.
        settings: what changes in the configuration.
        record: how the plan came about, for the reader.
    """

    encoder: str
    blocks: str
    kept: tuple[int, ...]
    slices: Mapping[str, Slice] = field(default_factory=dict)
    attributes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    settings: tuple[Setting, ...] = ()
    record: Mapping[str, Any] = field(default_factory=dict)

    def apply(self, model: nn.Module) -> None:
        """Cut a whole model, with or without weights (meta device), in place.

        Raises:
            UnsupportedModel: if the plan does not fit the model, or its encoder is quantized.
            AttachmentError: if a pipeline is attached to the model.
        """
        _require_order(model, self.encoder)
        try:
            encoder = model.get_submodule(self.encoder)
            for path, cut in self.slices.items():
                _slice(encoder.get_submodule(path), cut)
            for path, values in self.attributes.items():
                module = encoder.get_submodule(path)
                for name, value in values.items():
                    getattr(module, name)
                    setattr(module, name, value)
            parent, _, name = self.blocks.rpartition(".")
            blocks: Any = encoder.get_submodule(self.blocks)
            shorter = type(blocks)(*_chosen(blocks, self.kept))
            setattr(encoder.get_submodule(parent), name, shorter)
            self.set_configuration(model, "after")
        except (AttributeError, IndexError, TypeError, RuntimeError) as error:
            raise UnsupportedModel(
                f"the surgery plan does not fit {type(model).__name__}: {error}. It was made for "
                "another model, or for another version of it."
            ) from error
        setattr(model, _ATTRIBUTE, self)

    def set_configuration(self, model: Any, when: str) -> None:
        """Give the configuration its values ``"before"`` or ``"after"`` the surgery."""
        for setting in self.settings:
            owner = model
            for step in setting.path.split("."):
                owner = getattr(owner, step)
            setattr(owner, setting.name, getattr(setting, when))

    def save(self, folder: Path) -> None:
        """Write the plan beside a model's weights."""
        document = {"format": FORMAT, **asdict(self)}
        (folder / PLAN_FILE).write_text(json.dumps(document), encoding="utf-8")

    @classmethod
    def beside(cls, folder: Path) -> SurgeryPlan | None:
        """The plan in a model's folder; None if there is none.

        Raises:
            PipelineError: if the file is damaged, or of a later version.
        """
        path = folder / PLAN_FILE
        if not path.is_file():
            return None
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
            if document.pop("format") != FORMAT:
                raise PipelineError(
                    f"{path}: was written by a later version of tokenreduce. Upgrade: "
                    "pip install --upgrade tokenreduce"
                )
            slices = {name: _read_slice(cut) for name, cut in document.pop("slices").items()}
            settings = tuple(Setting(**setting) for setting in document.pop("settings"))
            kept = tuple(document.pop("kept"))
            return cls(kept=kept, slices=slices, settings=settings, **document)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, PipelineError):
                raise
            raise PipelineError(f"{path}: is no surgery plan: {error!r}.") from error


def plan_of(model: nn.Module) -> SurgeryPlan | None:
    """The plan that a model was cut by, or None."""
    return getattr(model, _ATTRIBUTE, None)


def cut_class(base: type[Any], plan: SurgeryPlan) -> type[Any]:
    """A class whose models are built whole and cut at once, for loading pruned weights into.

    Everything else that loading does (renamed weights, quantization, placing) is left as it is.
    Give what was loaded its own class back with :func:`restore_class`.
    """

    def build(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        holder = type("Holder", (), {"config": config})()
        plan.set_configuration(holder, "before")
        base.__init__(self, config, *args, **kwargs)
        plan.apply(self)

    named = {"__module__": base.__module__, "__qualname__": base.__qualname__}
    return type(base.__name__, (base,), {"__init__": build, **named})


def restore_class(model: Any, base: type[Any]) -> None:
    """Make a model that was loaded through :func:`cut_class` one of its own class."""
    model.__class__ = base


def _require_order(model: nn.Module, encoder: str) -> None:
    """Prune, then quantize, then attach: any other order would lose one of the three."""
    if attachment_of(find_decoder(model)) is not None:
        raise AttachmentError(
            f"a pipeline is attached to this {type(model).__name__}: detach it, prune, and attach "
            "it again."
        )
    for name, parameter in model.named_parameters():
        plain = type(parameter) is nn.Parameter and parameter.is_floating_point()
        if name.startswith(f"{encoder}.") and not plain:
            raise UnsupportedModel(
                f"{name} is quantized: its rows and columns cannot be cut. Prune first, "
                "then quantize; a pipeline with both does so."
            )


def _read_slice(cut: Mapping[str, Sequence[int] | None]) -> Slice:
    return Slice(**{name: None if kept is None else tuple(kept) for name, kept in cut.items()})


def _chosen(blocks: Any, kept: Sequence[int]) -> Any:
    chosen = [blocks[index] for index in kept]
    # A list takes its modules as one argument, a sequence one by one.
    return [chosen] if isinstance(blocks, nn.ModuleList) else chosen


def _slice(module: Any, cut: Slice) -> None:
    for name, parameter in list(module.named_parameters(recurse=False)):
        value: Tensor = parameter.detach()
        if cut.rows is not None:
            value = value.index_select(0, _index(cut.rows, value))
        if cut.columns is not None and value.ndim > 1:
            value = value.index_select(1, _index(cut.columns, value))
        setattr(module, name, nn.Parameter(value, requires_grad=parameter.requires_grad))
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, nn.LayerNorm):
        module.normalized_shape = tuple(module.weight.shape)


def _index(kept: Sequence[int], like: Tensor) -> Tensor:
    return torch.tensor(kept, dtype=torch.long, device=like.device)
