"""A reducer at a site, and running stages over packed items."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from tokenreduce.budget import Budget
from tokenreduce.capabilities import SITES, Site
from tokenreduce.errors import BudgetError, PipelineError, UnsupportedSite
from tokenreduce.packing import PackedTokens, reduce_packed
from tokenreduce.receipt import StageReceipt
from tokenreduce.reducer import BUDGET_FIELDS, Reducer
from tokenreduce.reduction import Reduction
from tokenreduce.tokens import Layout


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A reducer at a site.

    Args:
        reducer: the strategy with its budget.
        site: where it runs: ``frames`` (before the encoder), ``vision`` (inside its blocks),
            ``projector`` (after encoder and projector, before the LLM), ``decoder`` (after an LLM
            layer).
        total: most tokens that all visual items of one prompt may keep together.

    Raises:
        PipelineError: if ``reducer`` is none.
        UnsupportedSite: if the strategy does not run there.
        BudgetError: if ``total`` is out of range.
    """

    reducer: Reducer
    site: Site = "projector"
    total: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.reducer, Reducer):
            raise PipelineError(
                f"a stage runs a reducer, got {type(self.reducer).__name__}. Create one with "
                "tokenreduce.create_strategy(name, reduction=16)."
            )
        if self.site not in SITES:
            raise UnsupportedSite(f"unknown site {self.site!r}: one of {', '.join(SITES)}.")
        if self.total is not None:
            Budget(total=self.total)
        for reducer in (self.reducer, *self.reducer.inner_reducers()):
            sites = reducer.record.sites
            if self.site not in sites:
                raise UnsupportedSite(
                    f"strategy {reducer.name!r} does not run at the site {self.site!r}; it runs "
                    f"at: {', '.join(sites)}."
                )

    def with_budget(
        self,
        *,
        keep: int | None = None,
        keep_ratio: float | None = None,
        reduction: float | None = None,
        total: int | None = None,
    ) -> Stage:
        """The same stage with another budget; what is not given is as before."""
        given = {"keep": keep, "keep_ratio": keep_ratio, "reduction": reduction}
        reducer = self.reducer
        if any(value is not None for value in given.values()):
            reducer = reducer.with_budget(keep=keep, keep_ratio=keep_ratio, reduction=reduction)
        return replace(self, reducer=reducer, total=self.total if total is None else total)

    def require_budget(self) -> None:
        """Check that the stage knows how many tokens to keep.

        Raises:
            BudgetError: if neither the strategy nor ``total`` says so, or ``total`` cannot be
                shared because the strategy decides by itself.
        """
        if self.total is None:
            self.reducer.require_budget()
        elif self.reducer.budget is None and self.reducer.decides_alone:
            raise BudgetError(
                f"{self.reducer.name} decides by itself how many tokens to keep, so "
                f"total={self.total} cannot be shared among items. Give it a budget."
            )

    def reducers(self, layouts: Sequence[Layout], prompts: Sequence[int]) -> list[Reducer]:
        """The reducer for each item, with its share of ``total``.

        Args:
            layouts: the layout of each item.
            prompts: index of the prompt that each item belongs to.
        """
        if self.total is None:
            return [self.reducer] * len(layouts)
        self.require_budget()
        stated = {name: getattr(self.reducer, name) for name in BUDGET_FIELDS}
        budget = Budget(**stated, total=self.total)
        chosen: list[Reducer] = [self.reducer] * len(layouts)
        for prompt in dict.fromkeys(prompts):
            mine = [i for i, owner in enumerate(prompts) if owner == prompt]
            free = [len(layouts[i]) - layouts[i].protected_count for i in mine]
            for i, n, share in zip(mine, free, budget.shares(free), strict=True):
                chosen[i] = self.reducer.with_budget(keep=share if n else 1)
        return chosen


@dataclass(frozen=True, kw_only=True)
class ItemOutcome:
    """What became of one packed item.

    Attributes:
        reduction: all stages composed; None where every stage kept all.
        stages: one entry for each stage.
    """

    reduction: Reduction | None
    stages: tuple[StageReceipt, ...]


def keep_all_outcomes(
    stages: Sequence[Stage], layouts: Sequence[Layout], prompts: Sequence[int]
) -> list[ItemOutcome] | None:
    """The outcomes if budgets alone leave every item as it is, else None.

    Reads no tensor of the model: the keep-all path costs the device nothing.
    """
    receipts: list[list[StageReceipt]] = [[] for _ in layouts]
    for stage in stages:
        for i, reducer in enumerate(stage.reducers(layouts, prompts)):
            reason = reducer.reason_to_keep_all(len(layouts[i]) - layouts[i].protected_count)
            if not reason:
                return None
            if stage.total is not None:
                reason = f"within the budget of the prompt (total={stage.total})"
            receipts[i].append(_stage_receipt(stage, layouts[i], len(layouts[i]), reason))
    return [ItemOutcome(reduction=None, stages=tuple(done)) for done in receipts]


def unchanged_outcomes(
    stages: Sequence[Stage], layouts: Sequence[Layout], reason: str
) -> list[ItemOutcome]:
    """The outcomes of items that no stage was asked to touch."""
    return [
        ItemOutcome(
            reduction=None,
            stages=tuple(_stage_receipt(stage, layout, len(layout), reason) for stage in stages),
        )
        for layout in layouts
    ]


def run_stages(
    stages: Sequence[Stage], packed: PackedTokens, prompts: Sequence[int]
) -> list[ItemOutcome]:
    """Apply stages one after another to packed items.

    Args:
        stages: at least one, all at the same place in the model.
        packed: the items.
        prompts: index of the prompt that each item belongs to, for budgets per prompt.
    """
    composed: list[Reduction] = []
    receipts: list[list[StageReceipt]] = [[] for _ in packed.layouts]
    for number, stage in enumerate(stages):
        reductions = reduce_packed(packed, stage.reducers(packed.layouts, prompts))
        for i, reduction in enumerate(reductions):
            receipts[i].append(
                _stage_receipt(stage, packed.layouts[i], reduction.kept, reduction.reason)
            )
        if number + 1 < len(stages):
            rest = [
                reduction.tokens(packed.bucket([i]))[0] for i, reduction in enumerate(reductions)
            ]
            packed = PackedTokens.from_items(rest)
        composed = (
            [done.then(more) for done, more in zip(composed, reductions, strict=True)]
            if composed
            else reductions
        )
    return [
        ItemOutcome(
            reduction=reduction if _changes_anything(reduction) else None,
            stages=tuple(done),
        )
        for reduction, done in zip(composed, receipts, strict=True)
    ]


def _stage_receipt(stage: Stage, layout: Layout, kept: int, reason: str) -> StageReceipt:
    return StageReceipt(
        strategy=stage.reducer.name,
        site=stage.site,
        tokens_in=len(layout),
        tokens_out=kept,
        protected=layout.protected_count,
        reason=reason,
    )


def _changes_anything(reduction: Reduction) -> bool:
    return reduction.kept < reduction.source_count or not reduction.gathers
