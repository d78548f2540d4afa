"""From what became of an encoder's tokens to what becomes of the tokens that the LLM sees."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tokenreduce.receipt import StageReceipt
from tokenreduce.reduction import DROPPED, Reduction
from tokenreduce.stage import ItemOutcome, Stage
from tokenreduce.tokens import Layout

#: In place of a source: a token that the model adds after the encoder, such as a newline.
ADDED = -1


def carried(assignment: Tensor, positions: Tensor, source: Tensor) -> Reduction:
    """The reduction of the tokens that the LLM sees, by where each of them comes from.

    All tokens that flowed into one output carry equal features, so it is a gather: an output
    stands where it stood in the encoder or, if the LLM does not see that place (padding that the
    model cuts off), at the first token that flowed into it.

    Args:
        assignment: ``(N,)`` the output that each token of the encoder flowed into, -1 dropped.
        positions: ``(M,)`` the token that each output stands at.
        source: ``(L,)`` the encoder's token of each token of the LLM, or :data:`ADDED`.

    Returns:
        a batch of one without features: they are read off where the LLM reads.
    """
    length, outputs = source.shape[0], positions.shape[0]
    place = torch.arange(length, device=source.device)
    added = source < 0
    cluster = torch.where(added, outputs + place, assignment[source.clamp(min=0)])
    stays = cluster >= 0
    first_choice = added | (positions[cluster.clamp(min=0, max=outputs - 1)] == source)
    rank = torch.where(first_choice, place, place + length)
    best = torch.full((outputs + length,), 2 * length, device=source.device)
    best = best.scatter_reduce(0, cluster[stays], rank[stays], "amin")
    present = (best < 2 * length).nonzero().squeeze(1)
    stands, order = (best[present] % length).sort()
    new = torch.full_like(best, DROPPED)
    new[present[order]] = torch.arange(stands.shape[0], device=source.device)
    flowed = torch.where(stays, new[cluster.clamp(min=0)], DROPPED)
    return Reduction(
        features=torch.empty(1, stands.shape[0], 0, device=source.device),
        positions=stands[None],
        assignment=flowed[None],
    )


def item_outcome(
    stages: Sequence[Stage],
    layout: Layout,
    steps: Sequence[Reduction | None],
    reasons: Sequence[str],
) -> ItemOutcome:
    """The outcome of an item.

    Args:
        stages: those inside the encoder.
        layout: where the item's tokens lie.
        steps: what is left after each stage; None where nothing was cut so far.
        reasons: why each stage left the item as it was, or empty strings.
    """
    receipts, count = [], len(layout)
    for stage, step, reason in zip(stages, steps, reasons, strict=True):
        left = count if step is None else step.kept
        receipts.append(
            StageReceipt(
                strategy=stage.reducer.name,
                site="vision",
                tokens_in=count,
                tokens_out=left,
                protected=layout.protected_count,
                layer=stage.after,
                reason=reason if left == count else "",
            )
        )
        count = left
    last = next((step for step in reversed(steps) if step is not None), None)
    if last is not None and last.kept == last.source_count:
        last = None
    return ItemOutcome(reduction=last, stages=tuple(receipts))
