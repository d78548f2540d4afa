"""Stages inside a vision encoder that stands alone: classification and feature extraction."""

from __future__ import annotations

import functools
import inspect
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import nn

from tokenreduce.attachment import Attachment, ItemReduction
from tokenreduce.errors import ReductionError, UnsupportedSite
from tokenreduce.plugins import installed
from tokenreduce.receipt import ItemReceipt, Receipt, notify_observers
from tokenreduce.reduction import Reduction
from tokenreduce.stage import Stage
from tokenreduce.tokens import Layout
from tokenreduce_integrations.encoders.carry import ADDED, carried, item_outcome
from tokenreduce_integrations.encoders.dense import DenseWalk, Sequences
from tokenreduce_integrations.encoders.plan import check_stages, why_kept
from tokenreduce_integrations.encoders.stack import BlockStack, wrap_method
from tokenreduce_integrations.transformers.hooks import Uncopyable, restore_methods

Given = Mapping[str, Any]


class EncoderAttachment(Uncopyable, Attachment):
    """See :class:`tokenreduce.attachment.Attachment`.

    What the encoder returns has its usual shape: each token shows what it flowed into, zeros if it
    was dropped. ``prompt`` in receipts and reductions is the image's row in the batch. Threads may
    share the model; ``receipt`` and ``reductions`` are those of whichever encoding came last.

    Args:
        model: what the user attached to.
        encoder: the module in it that holds the blocks.
        stages: all at the vision site.
    """

    #: Methods of the encoder that run its blocks.
    entries: ClassVar[tuple[str, ...]] = ("forward",)

    def __init__(self, model: nn.Module, encoder: Any, stages: tuple[Stage, ...]) -> None:
        super().__init__(model, stages)
        self.encoder = encoder
        self._check(stages)
        self._stack: BlockStack[DenseWalk] = BlockStack(encoder, stages, self._prefix())
        self._replaced = []
        for name in self.entries:
            signature = inspect.signature(getattr(encoder, name))
            around = functools.partial(self._encode, name, signature)
            self._replaced.append(wrap_method(encoder, name, around))

    def detach(self) -> None:
        """See :meth:`tokenreduce.attachment.Attachment.detach`; detaching twice does nothing.

        Raises:
            AttachmentError: if something else replaced the same methods since.
        """
        self.attached = False
        replaced, self._replaced = self._replaced, []
        try:
            restore_methods(replaced)
        finally:
            self._stack.detach()

    # -- what differs between libraries ----------------------------------------------------------

    @abstractmethod
    def _prefix(self) -> int:
        """Class and register tokens that come before the patches."""

    @abstractmethod
    def _pools_patches(self) -> bool:
        """Whether the model averages or attends over all patches after its blocks."""

    @abstractmethod
    def _describe(self, given: Given, batch: int, length: int) -> Sequences:
        """What the sequences of an encoding are made of."""

    @abstractmethod
    def _shows_all(self, entry: str, given: Given) -> bool:
        """Whether the output of every block is asked for."""

    def _refuse(self) -> None:
        """Refuse to encode in a state of the model in which stages could not follow."""

    # -- encoding --------------------------------------------------------------------------------

    def _check(self, stages: Sequence[Stage]) -> None:
        elsewhere = next((stage for stage in stages if stage.site != "vision"), None)
        name = type(self.model).__name__
        if elsewhere is not None:
            raise UnsupportedSite(
                f"stage {elsewhere.reducer.name!r} at the site {elsewhere.site!r}: {name} is an "
                "encoder alone, and is served at the site 'vision' only: "
                "Stage(reducer=..., site='vision')."
            )
        drops = next((s.reducer for s in stages if s.reducer.record.kind == "prune"), None)
        if drops is not None and self._pools_patches():
            raise UnsupportedSite(
                f"strategy {drops.name!r} drops tokens, and {name} pools over all of them: what "
                "was dropped would count as zeros. Use a strategy that merges, or a model that "
                "reads its class token."
            )

    def _encode(
        self,
        entry: str,
        signature: inspect.Signature,
        call: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        if self._stack.walk is not None:
            return call(*args, **kwargs)
        if not self.enabled:
            reason = "the attachment is disabled"
            self._make_record = lambda: (Receipt(reason=reason), ())
            return call(*args, **kwargs)
        self._refuse()
        if self.regions:
            raise UnsupportedSite(
                "regions cannot be protected where a stage inside the encoder drops or merges "
                "their tokens first: leave the regions out."
            )
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        given = {**bound.arguments, **bound.arguments.get("kwargs", {})}
        stages, depth = self.stages, len(self._stack.blocks)
        self._check(stages)
        check_stages(stages, depth, type(self.encoder).__name__)
        shown = range(depth) if self._shows_all(entry, given) else (depth - 1,)
        walk = DenseWalk(
            stages,
            depth,
            frozenset(shown),
            functools.partial(self._describe, given),
            self._stack.signals,
        )
        with self._stack.walking(walk):
            output = call(*args, **kwargs)
        self._require_whole(walk)
        self._make_record = functools.partial(self._record, walk, depth)
        if installed().observers:
            notify_observers(self.receipt)
        return output

    def _require_whole(self, walk: DenseWalk) -> None:
        """Check that nothing was dropped that the model pools over."""
        if not walk.trails or not self._pools_patches():
            return
        lost = list(walk.trails.values())[-1].assignment < 0
        valid = walk.sequences.valid
        if bool((lost if valid is None else lost & valid.to(lost.device)).any()):
            raise ReductionError(
                f"a strategy dropped tokens, and {type(self.model).__name__} pools over all of "
                "them: what was dropped counted as zeros. Use a strategy that only merges."
            )

    def _record(self, walk: DenseWalk, depth: int) -> tuple[Receipt, tuple[ItemReduction, ...]]:
        sequences, items, reductions = walk.sequences, [], []
        for row, patches in enumerate(sequences.layouts):
            layout = _with_prefix(patches, sequences.prefix)
            steps: list[Reduction | None] = []
            reasons = []
            for index, stage in enumerate(walk.stages):
                trail = walk.trails.get(index)
                if trail is None:
                    steps.append(None)
                    reasons.append(why_kept(stage, depth, len(patches)))
                    continue
                real = torch.arange(len(patches))
                if sequences.valid is not None:
                    real = sequences.valid[row].nonzero().squeeze(1).cpu()
                source = torch.cat([torch.full((sequences.prefix,), ADDED), real])
                source = source.to(trail.positions.device)
                steps.append(carried(trail.assignment[row], trail.positions[row], source))
                reasons.append(trail.reasons[row])
            outcome = item_outcome(walk.stages, layout, steps, reasons)
            items.append(ItemReceipt(prompt=row, modality="image", stages=outcome.stages))
            reductions.append(
                ItemReduction(
                    prompt=row,
                    modality="image",
                    columns=torch.arange(len(layout)),
                    layout=layout,
                    reduction=outcome.reduction,
                )
            )
        reasons = [stage.reason for item in items for stage in item.stages[-1:]]
        receipt = Receipt(
            items=tuple(items),
            sequence_in=max(item.tokens_in for item in items),
            sequence_out=max(item.tokens_out for item in items),
            stopwatch=walk.stopwatch,
            reason="; ".join(dict.fromkeys(reasons)) if all(reasons) else "",
        )
        return receipt, tuple(reductions)


def _with_prefix(patches: Layout, count: int) -> Layout:
    if count == 0:
        return patches
    first = torch.zeros(count, 4, dtype=torch.long)
    guarded = torch.arange(len(patches) + count) < count
    return Layout(torch.cat([first, patches.coords]), guarded)
