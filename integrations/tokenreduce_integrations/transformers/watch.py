"""Watching a model encode visual items and place their features in the sequence.

Three methods are wrapped on the instance that owns the visual features, never on its class: the
two that encode, which say where the tokens of each item lie, and ``get_placeholder_mask``, which
says in which columns of the sequence features stand. It fires only where there are features, so a
placeholder token that the model happens to generate is never taken for an image.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import operator
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakTensorKeyDictionary

from tokenreduce.errors import (
    AttachmentError,
    MissingSignal,
    StageNotEngaged,
    UnsupportedModel,
)
from tokenreduce.regions import Regions
from tokenreduce.stage import ItemOutcome, join_outcomes
from tokenreduce.tokens import Layout
from tokenreduce_integrations.transformers.families import Family
from tokenreduce_integrations.transformers.hooks import (
    Replacement,
    Uncopyable,
    outside_compilation,
    replace_method,
    restore_methods,
)
from tokenreduce_integrations.transformers.layouts import joined_tiles
from tokenreduce_integrations.transformers.placement import MODALITIES, names_features
from tokenreduce_integrations.transformers.probes import Probe

_PIXELS = ("pixel_values", "pixel_values_images", "pixel_values_videos")


@dataclass(frozen=True)
class EncodedItem:
    """What is known of an encoded item.

    Attributes:
        layout: where its N tokens lie.
        signals: named ``(N, ...)`` tensors.
        earlier: what stages before or inside the encoder made of it, over its N tokens; None where
            there are no such stages.
    """

    layout: Layout
    signals: Mapping[str, Tensor]
    earlier: ItemOutcome | None = None


class EncoderSite(Protocol):
    """Stages before or inside the encoder.

    The encoder's output has the shape that it has without them, so that the model's own reshaping
    and counting hold: what was dropped or merged stands in it as filler, and the reduction is
    carried to where the LLM reads, and applied there once.
    """

    def encode(
        self, modality: str, call: Callable[..., Any], arguments: inspect.BoundArguments
    ) -> Any:
        """Run an encoding call, perhaps with other arguments.

        Pass them by name: transformers adds defaults by name, also of what was given by place.
        """
        ...

    def outcomes(self, layouts: Sequence[Layout]) -> list[ItemOutcome] | None:
        """What became of each item of the latest encoding call; None if the site was idle."""
        ...

    def detach(self) -> None:
        """Leave the encoder as it was."""
        ...


@dataclass(frozen=True)
class PlacedItem:
    """A visual item in a batch of prompts.

    ``columns`` ``(N,)`` are the places of its tokens in its prompt's row of the sequence, and
    ``parts`` says of how many encoded items it is made.
    """

    prompt: int
    modality: str
    columns: Tensor
    layout: Layout
    parts: int = 1


@dataclass(frozen=True)
class VisualInput:
    """The visual items of one call of the model.

    Attributes:
        masks: ``(B, S)`` for each modality, the columns that hold its features.
        encoded: the items of each modality, in reading order.
        input_ids: ``(B, S)``; None where the model was called with embeddings.
        joined: whether encoded items that follow one another without text between them are the
            tiles of one visual item.
        regions: regions whose tokens are protected.
    """

    masks: Mapping[str, Tensor]
    encoded: Mapping[str, Sequence[EncodedItem]]
    input_ids: Tensor | None = None
    joined: bool = False
    regions: Regions = field(default_factory=Regions)

    @cached_property
    def layouts(self) -> tuple[Layout, ...]:
        """The layout of each item, in the order of :attr:`items`."""
        if self.joined:
            return tuple(item.layout for item in self.items)
        return self._protected([item.layout for item in self._encoded])

    @cached_property
    def items(self) -> tuple[PlacedItem, ...]:
        """The items of each modality in reading order; reading them waits for the device.

        Raises:
            AttachmentError: if the placeholders do not hold whole items.
        """
        items = [
            item
            for modality, mask in self.masks.items()
            for item in _place(modality, mask, self.encoded[modality], joined=self.joined)
        ]
        layouts = self._protected([item.layout for item in items])
        return tuple(
            replace(item, layout=layout) for item, layout in zip(items, layouts, strict=True)
        )

    def expanded(self, batch: int) -> VisualInput:
        """The same for a batch that repeats each prompt, as beams do after features are placed."""
        times = batch // next(iter(self.masks.values())).shape[0]
        if times == 1:
            return self
        prompts = iter(replace(self, joined=False, regions=Regions()).items)
        encoded = {}
        for modality, items in self.encoded.items():
            placed = [(next(prompts).prompt, item) for item in items]
            encoded[modality] = [
                item
                for _, group in itertools.groupby(placed, key=operator.itemgetter(0))
                for _, item in list(group) * times
            ]
        masks = {name: mask.repeat_interleave(times, 0) for name, mask in self.masks.items()}
        ids = None if self.input_ids is None else self.input_ids.repeat_interleave(times, 0)
        return replace(self, masks=masks, encoded=encoded, input_ids=ids)

    @property
    def prompts(self) -> list[int]:
        """The row of each item."""
        return [item.prompt for item in self.items]

    @cached_property
    def earlier(self) -> list[ItemOutcome] | None:
        """What stages before or inside the encoder made of each item; None without any."""
        done = [item.earlier for item in self._encoded if item.earlier is not None]
        if len(done) not in (0, len(self._encoded)):
            raise AttachmentError(
                "some visual items of this call were encoded while the pipeline was attached, and "
                "others were not: its stages inside the encoder would act on some only. Encode all "
                "of them after attaching."
            )
        if not done or not self.joined:
            return done or None
        parts = iter(done)
        return [join_outcomes([next(parts) for _ in range(item.parts)]) for item in self.items]

    @property
    def _encoded(self) -> list[EncodedItem]:
        return [item for modality in self.masks for item in self.encoded[modality]]

    def _protected(self, layouts: Sequence[Layout]) -> tuple[Layout, ...]:
        if not self.regions:
            return tuple(layouts)
        regions = self.regions.of(len(layouts))
        return tuple(
            layout.protect(layout.within(boxes))
            for layout, boxes in zip(layouts, regions, strict=True)
        )

    def signals(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Signals that were read at the encoder, of all items end to end.

        Raises:
            MissingSignal: if an item was not encoded while the pipeline was attached.
        """
        for name in names:
            if any(name not in item.signals for item in self._encoded):
                raise MissingSignal(
                    f"signal {name!r} of visual features that were not encoded while the pipeline "
                    "was attached. Encode them after attaching, or use a strategy that reads "
                    "projected features only."
                )
        return {name: torch.cat([item.signals[name] for item in self._encoded]) for name in names}


class _Call(threading.local):
    """What has been seen of the call under way; threads may share a model."""

    def __init__(self) -> None:
        self.encoded: dict[str, list[EncodedItem]] = {}
        self.dense: dict[str, tuple[Tensor, list[EncodedItem]]] = {}
        self.masks: dict[str, Tensor] = {}
        self.input_ids: Tensor | None = None
        self.told = True
        self.expected = False
        self.inside_wrapper = False


class Handed(threading.local):
    """In place of a watch, where the attachment itself finds the visual items of a call."""

    def __init__(self) -> None:
        self.visual: VisualInput | None = None

    def take(self) -> VisualInput | None:
        """The visual items of the call under way, once."""
        visual, self.visual = self.visual, None
        return visual

    def detach(self) -> None:
        """Nothing was wrapped."""


class VisualWatch(Uncopyable):
    """Wraps the owner's methods while attached.

    Args:
        owner: the module that encodes visual items and merges their features into the sequence.
        family: what is particular about the model.
        probe: what catches signals of the encoder, if any are needed.
        site: stages before or inside the encoder, if there are any.
    """

    def __init__(
        self,
        owner: Any,
        family: Family,
        probe: Probe | None = None,
        site: EncoderSite | None = None,
    ) -> None:
        self.owner = owner
        self.family = family
        self._site = site
        self._encoded_as = WeakTensorKeyDictionary()
        self._latest: dict[str, list[Tensor]] = {}
        self._call = _Call()
        self._replaced: list[Replacement] = []
        self._probe = probe
        self._wrap(family.placement.method, self._see_placeholders)
        for modality in MODALITIES:
            if hasattr(owner, f"get_{modality}_features"):
                see = functools.partial(self._see_features, modality)
                self._wrap(f"get_{modality}_features", see, modality)
        self._handles: list[RemovableHandle] = [
            owner.register_forward_pre_hook(self._before_owner, with_kwargs=True),
            owner.register_forward_hook(self._after_owner),
        ]

    def take(self) -> VisualInput | None:
        """The visual items of the call under way, once; None for a call without any.

        Raises:
            AttachmentError: if features reached the sequence that were never seen being encoded.
        """
        call = self._call
        masks, call.masks = call.masks, {}
        input_ids, call.input_ids = call.input_ids, None
        if not call.told:
            masks = {name: mask for name, mask in masks.items() if name in call.encoded}
        if not masks:
            return None
        call.expected = False
        for modality in masks:
            if modality not in call.encoded:
                raise AttachmentError(
                    f"{modality} features reached {type(self.owner).__name__} that neither its "
                    f"get_{modality}_features nor mm_encoder_outputs gave: pass them through one "
                    "of the two."
                )
        encoded = {modality: call.encoded[modality] for modality in masks}
        if self.family.placement.runs:
            encoded = {modality: _runs(mask) for modality, mask in masks.items()}
        return VisualInput(masks, encoded, input_ids, joined=self.family.joins_tiles)

    def detach(self) -> None:
        """Remove hooks and wrappers; detaching twice does nothing.

        Raises:
            AttachmentError: if another library wrapped the same methods since and its wrapper is
                still in place; everything else is removed all the same.
        """
        self._latest = {}
        with ExitStack() as rest:
            for part in (self._site, self._probe):
                if part is not None:
                    rest.callback(part.detach)
            for handle in self._handles:
                handle.remove()
            self._unwrap()

    def _unwrap(self) -> None:
        replaced, self._replaced = self._replaced, []
        restore_methods(replaced)

    def _wrap(
        self, name: str, see: Callable[[Any, Mapping[str, Any]], None], modality: str = ""
    ) -> None:
        original = getattr(self.owner, name)
        signature = inspect.signature(original)
        site = self._site if modality else None

        def run(*args: Any, **kwargs: Any) -> Any:
            if site is None:
                return original(*args, **kwargs)
            return site.encode(modality, original, signature.bind(*args, **kwargs))

        @outside_compilation
        def look(result: Any, *args: Any, **kwargs: Any) -> None:
            see(result, signature.bind(*args, **kwargs).arguments)

        # generate() chooses the arguments of an encoding call by the signature, so it is kept.
        @functools.wraps(original)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            if self._call.inside_wrapper:
                # Some models encode video by way of their own image method.
                return original(*args, **kwargs)
            self._call.inside_wrapper = True
            if modality and self._probe is not None:
                self._probe.begin()
            try:
                result = run(*args, **kwargs)
            finally:
                self._call.inside_wrapper = False
            look(result, *args, **kwargs)
            return result

        self.install(name, wrapper)

    def install(self, name: str, wrapper: Callable[..., Any]) -> None:
        """Put a wrapper of a method on the instance, to be taken off again by ``detach``."""
        self._replaced.append(replace_method(self.owner, name, wrapper))

    def place(self, modality: str, features: Tensor, mask: Tensor) -> None:
        """Tell of features that no watched method encodes or places.

        Args:
            modality: ``"image"`` or ``"video"``.
            features: ``(items, N, D)``.
            mask: ``(B, S)`` columns that hold them.
        """
        items = [EncodedItem(Layout.line(feature.shape[0]), {}) for feature in features]
        self._call.encoded, self._call.masks = {modality: items}, {modality: mask}

    def _see_features(self, modality: str, output: Any, arguments: Mapping[str, Any]) -> None:
        """Remember where the tokens of each encoded item lie, and its signals."""
        pooled = self.family.features(output)
        if pooled is None:
            raise UnsupportedModel(
                f"get_{modality}_features of {type(self.owner).__name__} gives no pooler_output: "
                "this family needs an adapter of its own."
            )
        features = list(pooled)
        find = self.family.layouts.get(modality)
        layouts = (
            find(self.owner, features, arguments)
            if find is not None
            else [Layout.line(feature.shape[0]) for feature in features]
        )
        signals: list[dict[str, Tensor]] = [{} for _ in features]
        if self._probe is not None:
            signals = self._probe.read(modality, features, arguments)
        earlier: Sequence[ItemOutcome | None] | None = None
        if self._site is not None:
            earlier = self._site.outcomes(layouts)
        earlier = earlier or [None] * len(layouts)
        items = [EncodedItem(*item) for item in zip(layouts, signals, earlier, strict=True)]
        for feature, item in zip(features, items, strict=True):
            self._encoded_as[feature] = item
        if isinstance(pooled, Tensor):
            self._call.dense[modality] = (pooled.detach(), items)
            self._encoded_as[pooled] = items
        self._latest[modality] = [feature.detach() for feature in features]
        self._call.encoded[modality] = items

    def _see_placeholders(self, output: Any, arguments: Mapping[str, Any]) -> None:
        """Remember which columns hold visual features, for the modalities that have features, and
        what the others say."""
        call = self._call
        call.input_ids = arguments.get("input_ids")
        call.told = names_features(arguments)
        for modality, mask in self.family.placement.masks(self.owner, output, arguments).items():
            call.masks[modality] = mask[..., 0] if mask.ndim == 3 else mask

    def _encoded_earlier(self, modality: str, pooled: Any) -> list[EncodedItem]:
        """What is known of features that were encoded before, perhaps repeated since for beams.

        Repeating a list leaves its tensors what they are; a dense tensor becomes another one,
        whose items are recognised by their content.
        """
        known: list[EncodedItem | None]
        if not isinstance(pooled, Tensor):
            known = [self._encoded_as.get(feature) for feature in pooled]
        elif pooled in self._encoded_as:
            known = self._encoded_as[pooled]
        else:
            known = _recognised(pooled, *self._call.dense.get(modality, (pooled[:0], [])))
        for feature, item in zip(pooled, known, strict=True):
            if item is None and self._is_cut(modality, feature):
                raise AttachmentError(
                    f"{modality} features came in other pieces than they were encoded in: the "
                    "prompt was split (chunked prefill). Prefill in one call while a pipeline is "
                    "attached."
                )
        return [
            EncodedItem(Layout.line(feature.shape[0]), {}) if item is None else item
            for feature, item in zip(pooled, known, strict=True)
        ]

    def _is_cut(self, modality: str, feature: Tensor) -> bool:
        """Whether unknown features begin with a token of what was encoded last."""
        first = feature.reshape(-1, feature.shape[-1])[:1]
        cut = False
        for whole in self._latest.get(modality, []):
            if whole.shape == feature.shape and torch.equal(whole[:1], first):
                return False
            if whole.shape[-1] == first.shape[-1]:
                cut |= bool((whole == first).all(-1).any())
        return cut

    @outside_compilation
    def _before_owner(
        self, owner: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        if owner is not self.owner:
            raise AttachmentError(
                f"a replica of this {type(owner).__name__} was called (DataParallel on several "
                "devices?): its hooks would act on the original. Attach to one model for each "
                "device, or load the model with a device_map."
            )
        call = self._call
        call.masks, call.encoded = {}, {}
        encoded = kwargs.get("mm_encoder_outputs") or {}
        for modality in MODALITIES:
            pooled = self.family.features(encoded.get(modality))
            if pooled is not None:
                call.encoded[modality] = self._encoded_earlier(modality, pooled)
        pixels = any(kwargs.get(name) is not None for name in _PIXELS)
        call.expected = bool(call.encoded) or pixels

    @outside_compilation
    def _after_owner(self, _: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self._call.expected:
            self._call.expected = False
            raise StageNotEngaged(
                f"visual features went into {type(self.owner).__name__}, but the attached stages "
                "never saw them. Either get_placeholder_mask was replaced after attaching (detach, "
                "undo that, attach again), or the model ran compiled before (attach first, or call "
                "torch.compiler.reset()), or it merges its features in another way, and needs an "
                "adapter."
            )


def _recognised(
    pooled: Tensor, seen: Tensor, items: Sequence[EncodedItem]
) -> list[EncodedItem | None]:
    """For each item of ``(I, N, D)``, the equal one among those seen; None if there is none."""
    if pooled.shape[1:] != seen.shape[1:]:
        return [None] * len(pooled)
    alike = (pooled[:, None, 0] == seen[:, 0]).all(-1).tolist()
    return [
        next(
            (items[i] for i, same in enumerate(row) if same and torch.equal(feature, seen[i])), None
        )
        for feature, row in zip(pooled, alike, strict=True)
    ]


def _runs(mask: Tensor) -> list[EncodedItem]:
    """Each run of placeholders as an item without geometry."""
    before = functional.pad(mask, (1, 0))[:, :-1]
    number = (mask & ~before).reshape(-1).cumsum(0)[mask.reshape(-1)]
    _, counts = number.unique(return_counts=True)
    return [EncodedItem(Layout.line(count), {}) for count in counts.tolist()]


def _place(
    modality: str, mask: Tensor, encoded: Sequence[EncodedItem], *, joined: bool
) -> list[PlacedItem]:
    """The items of one modality in the sequence."""
    lengths = [len(item.layout) for item in encoded]
    places = mask.nonzero()
    if places.shape[0] != sum(lengths):
        raise AttachmentError(
            f"{places.shape[0]} {modality} placeholders, but items of {lengths} tokens: the prompt "
            "was split inside an item (chunked prefill). Prefill in one call while a pipeline is "
            "attached."
        )
    items: list[PlacedItem] = []
    rows, columns = places.t().tolist()
    start = 0
    for item, length in zip(encoded, lengths, strict=True):
        stop = start + length
        if length and rows[start] != rows[stop - 1]:
            raise AttachmentError(
                f"{modality} of {length} tokens lies across prompts {rows[start]} and "
                f"{rows[stop - 1]}: placeholders and features disagree."
            )
        prompt = rows[start] if length else 0
        items.append(PlacedItem(prompt, modality, places[start:stop, 1], item.layout))
        start = stop
    return _join_runs(items, columns) if joined else items


def _join_runs(tiles: Sequence[PlacedItem], columns: Sequence[int]) -> list[PlacedItem]:
    """Tiles that follow one another without text between them, as one item.

    Args:
        tiles: in reading order.
        columns: of all their tokens.
    """
    runs: list[list[PlacedItem]] = []
    start = 0
    for tile in tiles:
        follows = start > 0 and columns[start] == columns[start - 1] + 1
        if follows and tile.prompt == runs[-1][-1].prompt:
            runs[-1].append(tile)
        else:
            runs.append([tile])
        start += len(tile.layout)
    return [
        replace(
            run[0],
            columns=torch.cat([tile.columns for tile in run]),
            layout=joined_tiles([tile.layout for tile in run]),
            parts=len(run),
        )
        for run in runs
    ]
