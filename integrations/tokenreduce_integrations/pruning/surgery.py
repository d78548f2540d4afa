"""Surgery plans: what was cut out of a vision encoder, as data that can be saved and done again.

A plan says which blocks, which rows and columns of which weights stay, and which attributes and
settings change with them. It is written beside the weights, so that shapes which no configuration
can express load again: the model is built as its configuration says, cut, and then filled.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tokenreduce.errors import AttachmentError, PipelineError, UnsupportedModel
from tokenreduce_integrations.transformers.attachment import attachment_of
from tokenreduce_integrations.transformers.families import find_decoder
from tokenreduce_integrations.transformers.files import PLAN_FILE

FORMAT = 1

_ATTRIBUTE = "_tokenreduce_surgery"


@dataclass(frozen=True, kw_only=True)
class Slice:
    """The rows and columns of a module's weights that stay.

    Attributes:
        rows: of every parameter (outputs of a linear layer, channels of a norm); None for all.
        columns: of its weight (inputs of a linear layer); None for all.

    Raises:
        PipelineError: if they are not distinct indices.
    """

    rows: tuple[int, ...] | None = None
    columns: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        for kept in (self.rows, self.columns):
            if kept is not None:
                _require_indices(kept, "the rows and columns that stay")


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A value that the surgery changes in the model's configuration.

    Attributes:
        path: attributes that lead from the model to the object, as ``"config.vision_config"``.
        name: the attribute.
        before: its value in the whole model, a whole number or a list of them.
        after: its value in the pruned one.

    Raises:
        PipelineError: if it is no setting of a configuration, or of another type.
    """

    path: str
    name: str
    before: Any
    after: Any

    def __post_init__(self) -> None:
        steps = [*self.path.split("."), self.name]
        if steps[0] != "config" or any(step.startswith("_") for step in steps):
            raise PipelineError(f"a surgery plan changes the configuration, not {'.'.join(steps)}.")
        for value in (self.before, self.after):
            _require_numbers(value, ".".join(steps))


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

    Raises:
        PipelineError: if no block stays, or an entry is of a wrong type.
    """

    encoder: str
    blocks: str
    kept: tuple[int, ...]
    slices: Mapping[str, Slice] = field(default_factory=dict)
    attributes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    settings: tuple[Setting, ...] = ()
    record: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _require_indices(self.kept, "the blocks that stay")
        for path, values in self.attributes.items():
            for name, value in values.items():
                _require_numbers(value, f"{path}.{name}")

    def apply(self, model: nn.Module) -> None:
        """Cut a whole model, with or without weights (meta device), in place.

        Raises:
            UnsupportedModel: if the plan does not fit the model, or its encoder is quantized.
            AttachmentError: if a pipeline is attached to the model.
        """
        _require_order(model, self.encoder)
        with _fitting(type(model).__name__):
            encoder = model.get_submodule(self.encoder)
            for path, cut in self.slices.items():
                _slice(encoder.get_submodule(path), cut)
            for path, values in self.attributes.items():
                for name, value in values.items():
                    _replace(encoder.get_submodule(path), name, value)
            parent, _, name = self.blocks.rpartition(".")
            blocks: Any = encoder.get_submodule(self.blocks)
            shorter = type(blocks)(*_chosen(blocks, self.kept))
            setattr(encoder.get_submodule(parent), name, shorter)
        self.set_configuration(model, "after")
        setattr(model, _ATTRIBUTE, self)

    def set_configuration(self, model: Any, when: str) -> None:
        """Give the configuration its values ``"before"`` or ``"after"`` the surgery.

        Raises:
            UnsupportedModel: if the plan does not fit the configuration.
        """
        with _fitting(type(model.config).__name__):
            for setting in self.settings:
                owner = model
                for step in setting.path.split("."):
                    owner = getattr(owner, step)
                _replace(owner, setting.name, getattr(setting, when))

    def save(self, folder: Path) -> None:
        """Write the plan beside a model's weights."""
        document = {"format": FORMAT, **asdict(self)}
        (folder / PLAN_FILE).write_text(json.dumps(document), encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> SurgeryPlan:
        """The plan in a file.

        Raises:
            PipelineError: if the file is damaged, or of a later version.
        """
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
            if document.pop("format") != FORMAT:
                raise PipelineError(
                    "it was written by a later version of tokenreduce. Upgrade: pip install "
                    "--upgrade tokenreduce"
                )
            slices = {name: _read_slice(cut) for name, cut in document.pop("slices").items()}
            settings = tuple(Setting(**setting) for setting in document.pop("settings"))
            kept = tuple(document.pop("kept"))
            return cls(kept=kept, slices=slices, settings=settings, **document)
        except PipelineError as error:
            raise PipelineError(f"{path}: {error}") from error
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
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


@contextmanager
def _fitting(name: str) -> Iterator[None]:
    """Say of a plan that fails that it is not the plan of this model."""
    try:
        yield
    except (AttributeError, IndexError, TypeError, RuntimeError) as error:
        raise UnsupportedModel(
            f"the surgery plan does not fit {name}: {error}. It was made for another model, or for "
            "another version of it."
        ) from error


def _require_indices(kept: Sequence[Any], what: str) -> None:
    if not kept or not all(type(i) is int and i >= 0 for i in kept) or len({*kept}) < len(kept):
        raise PipelineError(f"a surgery plan names {what} by distinct indices, got {_short(kept)}.")


def _require_numbers(value: Any, name: str) -> None:
    numbers = value if isinstance(value, list | tuple) else (value,)
    if not all(type(number) is int for number in numbers):
        raise PipelineError(f"a surgery plan sets {name} to whole numbers, got {_short(value)}.")


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]} ..."


def _replace(owner: Any, name: str, value: Any) -> None:
    """Change what is a number, or a list of them, already."""
    if not isinstance(getattr(owner, name), int | list | tuple):
        raise TypeError(f"{type(owner).__name__}.{name} is no number")
    setattr(owner, name, value)


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
            value = _select(value, 0, cut.rows)
        if cut.columns is not None and value.ndim > 1:
            value = _select(value, 1, cut.columns)
        setattr(module, name, nn.Parameter(value, requires_grad=parameter.requires_grad))
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, nn.LayerNorm):
        module.normalized_shape = tuple(module.weight.shape)


def _select(value: Tensor, axis: int, kept: Sequence[int]) -> Tensor:
    if max(kept) >= value.shape[axis]:
        # Without weights (meta device) torch would not notice.
        raise IndexError(f"index {max(kept)} of {value.shape[axis]}")
    return value.index_select(axis, torch.tensor(kept, device=value.device))
