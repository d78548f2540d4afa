"""How many tokens go on after which block of an encoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tokenreduce.budget import Budget
from tokenreduce.errors import BudgetError, PipelineError, UnsupportedSite
from tokenreduce.reducer import Reducer
from tokenreduce.stage import Stage


@dataclass(frozen=True)
class Cut:
    """One call of a strategy after a block.

    Attributes:
        stage: index of its stage.
        reducers: the strategy with its budget, for each sequence.
    """

    stage: int
    reducers: tuple[Reducer, ...]


def cut_blocks(stage: Stage, depth: int) -> tuple[int, ...]:
    """After how many blocks a stage cuts: where it says so, else after every one of ``depth``."""
    return stage.layers or tuple(range(1, depth + 1))


def check_stages(stages: Sequence[Stage], depth: int, encoder: str) -> None:
    """Check that stages fit an encoder.

    Args:
        stages: all at the vision site.
        depth: blocks that the features for the LLM (or the pooling) depend on.
        encoder: how errors call the encoder.

    Raises:
        PipelineError: if a stage names a block whose output nothing reads, or two stages overlap.
        UnsupportedSite: if a strategy needs a full grid at several blocks, or a budget of a whole
            prompt is given.
    """
    before = 0
    for stage in stages:
        blocks = cut_blocks(stage, depth)
        name = stage.reducer.name
        if blocks[-1] > depth:
            raise PipelineError(
                f"stage {name!r} after block {blocks[-1]}: the features that {encoder} hands on "
                f"depend on its first {depth} blocks only, so the cut would have no effect. Use a "
                f"block from 1 to {depth}."
            )
        if blocks[0] <= before:
            raise PipelineError(
                f"stage {name!r} begins after block {blocks[0]}, where the stage before it has not "
                f"ended (block {before}). Stages inside the encoder follow one another: give each "
                "its own layer or schedule, or run both at one block with chain(...)."
            )
        before = blocks[-1]
        if stage.total is not None:
            raise UnsupportedSite(
                f"stage {name!r}: total={stage.total} is shared among the images of a prompt, "
                "which the encoder does not see. Give keep, keep_ratio or reduction; or use total "
                "at the projector site."
            )
        parts = (stage.reducer, *stage.reducer.inner_reducers())
        grid = next((part.name for part in parts if part.record.needs_grid), None)
        if grid is not None and (len(blocks) > 1 or len(stages) > 1):
            raise UnsupportedSite(
                f"strategy {grid!r} needs a full grid of tokens, and after the first cut inside "
                "the encoder there is none. Cut once, with layer=..."
            )


def plan_cuts(
    stages: Sequence[Stage], depth: int, lengths: Sequence[int], owners: Sequence[int]
) -> dict[int, list[Cut]]:
    """The cuts after each block; a block without any has no entry.

    A budget counts the tokens of an item (an image with its tiles) that the encoder's blocks see,
    class and register tokens aside. The sequences of an item share it in proportion to their
    lengths. A stage that names no block takes an equal part away after every one of the ``depth``
    blocks: of N tokens that shall become K, ``N - (N - K) i // depth`` go on after block i, which
    is K exactly after the last.

    Args:
        stages: those at the vision site that act now.
        depth: see :func:`check_stages`.
        lengths: tokens of each sequence.
        owners: the item that each sequence belongs to.
    """
    cuts: dict[int, list[Cut]] = {}
    for index, stage in enumerate(stages):
        for block in cut_blocks(stage, depth):
            reducer = stage.at(block).reducer if stage.layers else stage.reducer
            reducers = (reducer,) * len(lengths)
            if reducer.budget is not None:
                keeps = _shares(reducer.budget, lengths, owners)
                if not stage.layers:
                    keeps = [
                        n - (n - keep) * block // depth
                        for n, keep in zip(lengths, keeps, strict=True)
                    ]
                budgeted = {keep: reducer.with_budget(keep=keep) for keep in set(keeps)}
                reducers = tuple(budgeted[keep] for keep in keeps)
                if all(keep >= n for keep, n in zip(keeps, lengths, strict=True)):
                    continue
            cuts.setdefault(block, []).append(Cut(index, reducers))
    return cuts


def why_kept(stage: Stage, depth: int, tokens: int) -> str:
    """Why a stage cut nothing of an item of ``tokens`` tokens."""
    if stage.schedule is not None:
        stage = stage.at(cut_blocks(stage, depth)[-1])
    return stage.reducer.reason_to_keep_all(tokens)


def _shares(budget: Budget, lengths: Sequence[int], owners: Sequence[int]) -> list[int]:
    """Tokens to keep of each sequence, so that the items' budgets hold exactly."""
    keeps = [0] * len(lengths)
    for item in dict.fromkeys(owners):
        mine = [i for i, owner in enumerate(owners) if owner == item]
        keep = budget.count(sum(lengths[i] for i in mine))
        if keep < len(mine):
            raise BudgetError(
                f"{budget} leaves {keep} tokens of an image that the encoder sees in {len(mine)} "
                "tiles: each tile keeps at least one. Raise the budget."
            )
        shares = Budget(total=keep).shares([lengths[i] for i in mine])
        for i, share in zip(mine, shares, strict=True):
            keeps[i] = share
    return keeps
