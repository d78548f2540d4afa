"""Items of any layouts, stored end to end and reduced in buckets of equal layout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import Tensor

from tokenreduce.errors import TokensError
from tokenreduce.plugins import installed
from tokenreduce.reducer import Reducer
from tokenreduce.reduction import Reduction
from tokenreduce.tokens import Layout, VisualTokens


@dataclass(frozen=True, kw_only=True)
class PackedTokens:
    """Visual items end to end, without padding.

    Attributes:
        features: ``(total, D)``.
        layouts: the layout of each item; their lengths sum to ``total``.
        sizes: ``(total,)`` float32, how many source tokens each token stands for; None for ones.
        signals: per-token ones packed like the features; of the others, one tensor for each item,
            whose shapes may differ (prompts have different lengths).
    """

    features: Tensor
    layouts: tuple[Layout, ...]
    sizes: Tensor | None = None
    signals: Mapping[str, Tensor | Sequence[Tensor]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        total = sum(len(layout) for layout in self.layouts)
        if self.features.ndim != 2 or self.features.shape[0] != total:
            raise TokensError(
                f"layouts describe {total} tokens, packed features have shape "
                f"{tuple(self.features.shape)}."
            )

    @classmethod
    def from_items(cls, items: Sequence[VisualTokens]) -> PackedTokens:
        """Pack batches of one."""
        vocabulary = installed().signals
        names = items[0].signals if items else {}
        return cls(
            features=torch.cat([item.features[0] for item in items]),
            layouts=tuple(item.layout for item in items),
            sizes=torch.cat([item.sizes[0] for item in items]),
            signals={
                name: torch.cat([item.signals[name][0] for item in items])
                if vocabulary[name].per_token
                else [item.signals[name][0] for item in items]
                for name in names
            },
        )

    @property
    def offsets(self) -> list[int]:
        """Where each item begins, and the total at the end."""
        return [0, *accumulate(len(layout) for layout in self.layouts)]

    def bucket(self, items: Sequence[int]) -> VisualTokens:
        """Items of equal layout as a dense batch; consecutive ones are a view, not a copy."""
        offsets, n = self.offsets, len(self.layouts[items[0]])
        start, stop = items[0], items[-1] + 1
        consecutive = list(items) == list(range(start, stop))

        def dense(packed: Tensor) -> Tensor:
            if consecutive:
                run = packed[offsets[start] : offsets[stop]]
                return run.reshape(len(items), n, *packed.shape[1:])
            return torch.stack([packed[offsets[i] : offsets[i] + n] for i in items])

        return VisualTokens(
            dense(self.features),
            self.layouts[items[0]],
            sizes=None if self.sizes is None else dense(self.sizes),
            signals={
                name: dense(signal)
                if isinstance(signal, Tensor)
                else torch.stack([signal[i] for i in items])
                for name, signal in self.signals.items()
            },
        )

    def signal_shapes(self, item: int) -> tuple[tuple[int, ...], ...]:
        """The shapes of an item's signals that are not per token."""
        ragged = (signal for signal in self.signals.values() if not isinstance(signal, Tensor))
        return tuple(tuple(signal[item].shape) for signal in ragged)


def reduce_packed(packed: PackedTokens, reducers: Sequence[Reducer]) -> list[Reduction]:
    """Reduce every item, calling each reducer once for each bucket of equal items.

    Args:
        packed: the items.
        reducers: one for each item; equal reducers share buckets.

    Returns:
        one reduction (a batch of one) for each item.
    """
    buckets: dict[object, list[int]] = {}
    for index, (layout, reducer) in enumerate(zip(packed.layouts, reducers, strict=True)):
        # What an adaptive strategy keeps differs between items, so it sees them one by one.
        alone = index if reducer.count_class == "adaptive" else None
        key = (layout.key, reducer, packed.signal_shapes(index), alone)
        buckets.setdefault(key, []).append(index)
    reductions: list[Reduction | None] = [None] * len(packed.layouts)
    for items in buckets.values():
        reduction = reducers[items[0]](packed.bucket(items))
        for row, index in enumerate(items):
            reductions[index] = reduction.item(row)
    return [reduction for reduction in reductions if reduction is not None]
