"""Pipelines on live models: the interface that every integration implements."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Protocol, Self

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tokenreduce.errors import AttachmentError, BudgetError, PipelineError, UnsupportedModel
from tokenreduce.pipeline import Pipeline
from tokenreduce.plugins import installed
from tokenreduce.receipt import Receipt
from tokenreduce.reducer import Reducer
from tokenreduce.reduction import Reduction
from tokenreduce.regions import Regions
from tokenreduce.registry import import_target
from tokenreduce.stage import Stage
from tokenreduce.tokens import Layout

Reducible = Reducer | Stage | Pipeline | Sequence["Reducer | Stage"]


@dataclass(frozen=True, kw_only=True)
class ItemReduction:
    """What became of one visual item of a prompt, for grounding and overlays.

    Attributes:
        prompt: index of the prompt in the batch.
        modality: ``"image"`` or ``"video"``.
        columns: ``(N,)`` places of the item's tokens in the sequence that the model was given.
        layout: where the item's tokens lie in what the user supplied.
        reduction: a batch of one; None where every token was kept.
    """

    prompt: int
    modality: str
    columns: Tensor
    layout: Layout
    reduction: Reduction | None

    @property
    def kept(self) -> Tensor:
        """``(M,)`` indices of the kept tokens in the item, ascending, on the CPU."""
        if self.reduction is None:
            return self.layout.coords.new_tensor(range(len(self.layout)))
        return self.reduction.positions[0].cpu()

    @property
    def assignment(self) -> Tensor:
        """``(N,)`` the output that each token chiefly flowed into, -1 dropped, on the CPU."""
        return self.kept if self.reduction is None else self.reduction.assignment[0].cpu()

    @property
    def coords(self) -> Tensor:
        """``(M, 4)`` (block, t, y, x) of the kept tokens, on the CPU."""
        return self.layout.coords[self.kept]


class Attachment(ABC):
    """A pipeline on a live model. Leaves no trace once detached.

    Use it as a context manager, or call :meth:`detach`.
    """

    def __init__(self, model: nn.Module, stages: tuple[Stage, ...]) -> None:
        self.model = model
        self.stages = stages
        self.attached = True
        self.enabled = True
        #: Regions whose tokens survive; what an integration reduces must respect them.
        self.regions = Regions()
        self._receipt: Receipt | None = None
        self._reductions: tuple[ItemReduction, ...] = ()
        #: Makes the latest record when it is asked for: making it may wait for the device.
        self._make_record: Callable[[], tuple[Receipt, tuple[ItemReduction, ...]]] | None = None

    @property
    def receipt(self) -> Receipt:
        """The record of the latest prefill.

        Raises:
            AttachmentError: if the model has not run since it was attached.
        """
        self._read_record()
        if self._receipt is None:
            raise AttachmentError("no receipt yet: the model has not run since it was attached.")
        return self._receipt

    @property
    def reductions(self) -> tuple[ItemReduction, ...]:
        """What became of each visual item of the latest prefill."""
        self._read_record()
        return self._reductions

    def _read_record(self) -> None:
        if self._make_record is not None:
            (self._receipt, self._reductions), self._make_record = self._make_record(), None

    @abstractmethod
    def detach(self) -> None:
        """Take the pipeline off and leave the model exactly as it was before.

        It sets ``attached`` to False.
        """

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Keep all tokens while the context is open; the pipeline stays attached.

        Raises:
            AttachmentError: if it is attached no more.
        """
        self._require_attached()
        before, self.enabled = self.enabled, False
        try:
            yield
        finally:
            self.enabled = before

    @contextmanager
    def protecting(self, regions: Sequence[Any]) -> Iterator[None]:
        """Other protected regions while the context is open.

        Args:
            regions: as ``protect`` of :func:`attach`.

        Raises:
            TokensError: if they are malformed.
            AttachmentError: if the pipeline is attached no more.
        """
        self._require_attached()
        before, self.regions = self.regions, Regions(regions)
        try:
            yield
        finally:
            self.regions = before

    @contextmanager
    def budget(
        self,
        *,
        keep: int | None = None,
        keep_ratio: float | None = None,
        reduction: float | None = None,
        total: int | None = None,
        stage: int | None = None,
    ) -> Iterator[None]:
        """Another budget while the context is open.

        Args:
            keep: as for :class:`~tokenreduce.budget.Budget`.
            keep_ratio: likewise.
            reduction: likewise.
            total: likewise.
            stage: index of the stage; needed where there are several.

        Raises:
            BudgetError: if the budget is invalid or missing.
            AttachmentError: if it is unclear which stage is meant, or the pipeline is attached no
                more.
        """
        self._require_attached()
        if keep is None and keep_ratio is None and reduction is None and total is None:
            raise BudgetError("no budget: give keep, keep_ratio, reduction or total.")
        if stage is None and len(self.stages) > 1:
            raise AttachmentError(
                f"this pipeline has {len(self.stages)} stages: say which one the budget is for, "
                "as in budget(keep=64, stage=0)."
            )
        index = 0 if stage is None else stage
        if type(index) is not int or index not in range(len(self.stages)):
            raise AttachmentError(
                f"stage={stage!r}: this pipeline has the stages 0 to {len(self.stages) - 1}."
            )
        before = self.stages
        changed = before[index].with_budget(
            keep=keep, keep_ratio=keep_ratio, reduction=reduction, total=total
        )
        self.stages = (*before[:index], changed, *before[index + 1 :])
        try:
            yield
        finally:
            self.stages = before

    def _require_attached(self) -> None:
        if not self.attached:
            raise AttachmentError(
                f"the pipeline was detached from this {type(self.model).__name__}: nothing is "
                "reduced any more. Attach it again first."
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.detach()


class ModelAdapter(Protocol):
    """What an integration offers for a family of models."""

    def check(
        self,
        model: nn.Module,
        stages: tuple[Stage, ...],
        processor: Any | None = None,
        joint_encoder: Any | None = None,
    ) -> None:
        """Check that stages can run on a model, whose weights need not be there (meta device).

        Args:
            model: the model.
            stages: the stages.
            processor: the model's processor, or where it will be loaded from.
            joint_encoder: as for :func:`attach`.

        Raises:
            UnsupportedModel: if the model has no visual tokens in its sequence.
            UnsupportedSite: if a stage's site cannot be served on it.
            MissingSignal: if a stage needs a signal that the model cannot give.
        """
        ...

    def attach(
        self,
        model: nn.Module,
        stages: tuple[Stage, ...],
        processor: Any | None = None,
        joint_encoder: Any | None = None,
    ) -> Attachment:
        """Put stages on a model, having checked them.

        Args:
            model: the model.
            stages: the stages.
            processor: as for :func:`attach`.
            joint_encoder: likewise.

        Raises:
            TokenReduceError: as for :meth:`check`.
            AttachmentError: if something is attached already.
        """
        ...


def attach(
    model: nn.Module,
    pipeline: Reducible,
    *,
    processor: Any | None = None,
    joint_encoder: Any | None = None,
    protect: Sequence[Any] = (),
) -> Attachment:
    """Make a live model see fewer visual tokens.

    Args:
        model: a multimodal model of a library that an installed adapter serves, also compiled,
            parallel, or with PEFT adapters.
        pipeline: a reducer (used at the projector site), a stage, several of them, or a pipeline.
        processor: the model's processor, or its tokenizer. With it, strategies that read the prompt
            tell text from special tokens; those that compare image and prompt in a joint space
            need it.
        joint_encoder: the vision-text encoder that the model took its vision tower from, for
            strategies that compare image and prompt in its space: a folder, a hub name such as
            ``"openai/clip-vit-large-patch14-336"``, or a loaded model and its tokenizer as a pair.
            It is loaded only if a stage needs it, without its own vision tower.
        protect: regions whose tokens survive, outside the budget: boxes (x0, y0, x1, y1) from 0 to
            1, relative to the picture that the encoder sees, for every image and every frame; or a
            list of boxes for each visual item of the prompts, in the order of ``reductions``.

    Returns:
        the attachment; use it as a context manager or call its ``detach``.

    Raises:
        UnsupportedModel: if no installed adapter serves the model.
        BudgetError: if a stage has no budget.
        TokensError: if a protected region is malformed.
        UnsupportedSite: if a stage cannot run at its site on this model.
        MissingSignal: if a stage needs a signal that the model cannot give.
        AttachmentError: if a pipeline is attached to the model already.
    """
    model = unwrapped(model)
    stages, regions = as_stages(pipeline), Regions(protect)
    for stage in stages:
        stage.require_budget()
    attachment = find_adapter(model).attach(model, stages, processor, joint_encoder)
    attachment.regions = regions
    return attachment


def unwrapped(model: nn.Module) -> nn.Module:
    """The model that a compiled, parallel or PEFT wrapper forwards to: hooks belong there."""
    inner: Any = model
    while True:
        if isinstance(inner, nn.DataParallel | DistributedDataParallel):
            inner = inner.module
        elif hasattr(inner, "_orig_mod"):
            inner = inner._orig_mod
        elif hasattr(inner, "get_base_model"):
            inner = inner.get_base_model()
        else:
            break
    found: nn.Module = inner
    return found


def as_stages(pipeline: Reducible) -> tuple[Stage, ...]:
    """The stages of whatever :func:`attach` accepts.

    Raises:
        PipelineError: if it is something else, or holds no stage.
    """
    if isinstance(pipeline, Pipeline):
        return pipeline.stages
    parts: Iterable[object] = (
        (pipeline,) if isinstance(pipeline, Reducer | Stage) else _iterate(pipeline)
    )
    stages = []
    for part in parts:
        if isinstance(part, Reducer):
            part = Stage(reducer=part)
        if not isinstance(part, Stage):
            raise PipelineError(
                f"a pipeline is made of reducers and stages, got {type(part).__name__}. "
                "Create one with tokenreduce.create_strategy(name, reduction=16)."
            )
        stages.append(part)
    if not stages:
        raise PipelineError("a pipeline needs at least one stage.")
    return tuple(stages)


def find_adapter(model: nn.Module) -> ModelAdapter:
    """The adapter of the nearest class among the model's ancestors that has one.

    Raises:
        UnsupportedModel: if there is none.
    """
    registry = installed().model_adapters
    by_class = {qualified: name for name in registry for qualified in registry[name].models}
    patterns = [pattern for pattern in by_class if "*" in pattern]
    for ancestor in type(model).__mro__:
        qualified = f"{ancestor.__module__}.{ancestor.__qualname__}"
        matching = (pattern for pattern in patterns if fnmatchcase(qualified, pattern))
        name = by_class.get(qualified) or by_class.get(next(matching, ""))
        if name is not None:
            adapter: ModelAdapter = registry.resolve(name)()
            return adapter
    raise UnsupportedModel(
        f"no installed model adapter serves {type(model).__module__}.{type(model).__qualname__}. "
        f"Served: {', '.join(sorted(by_class)) or 'none'}. A plugin can add one through the hook "
        "register_model_adapters."
    )


def find_loader(name: str) -> Any:
    """The function that loads models for a pipeline.

    Raises:
        PipelineError: if the adapter offers none.
    """
    record = installed().model_adapters[name]
    if not record.loader:
        raise PipelineError(f"model adapter {name!r} cannot load models for a pipeline.")
    return import_target(record.loader, what=f"loader of model adapter {name!r}")


def find_saver(name: str) -> Any:
    """The function that writes models of a pipeline.

    Raises:
        PipelineError: if the adapter offers none.
    """
    record = installed().model_adapters[name]
    if not record.saver:
        raise PipelineError(f"model adapter {name!r} cannot save the models of a pipeline.")
    return import_target(record.saver, what=f"saver of model adapter {name!r}")


def _iterate(pipeline: object) -> Iterable[object]:
    if isinstance(pipeline, Iterable) and not isinstance(pipeline, str):
        return pipeline
    return (pipeline,)
