"""A reducer at a site, and running stages over packed items."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from math import floor
from numbers import Integral, Real
from typing import Protocol

import torch

from tokenreduce.budget import COSTS, Budget, as_fraction
from tokenreduce.capabilities import SITES, Site
from tokenreduce.errors import BudgetError, PipelineError, UnsupportedSite
from tokenreduce.packing import PackedTokens, reduce_packed
from tokenreduce.receipt import Spending, StageReceipt
from tokenreduce.reducer import BUDGET_FIELDS, Reducer
from tokenreduce.reduction import Reduction
from tokenreduce.tokens import Layout


class Price(Protocol):
    """What tokens cost in the layers of an LLM."""

    def __call__(self, tokens: int, first: int, last: int | None) -> float:
        """The cost of tokens in the layers from ``first`` up to ``last``, or to the end."""
        ...


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A reducer at a site.

    Args:
        reducer: the strategy with its budget.
        site: where it runs: ``frames`` (before the encoder), ``vision`` (inside its blocks),
            ``projector`` (after encoder and projector, before the LLM), ``decoder`` (after an LLM
            layer).
        total: most tokens that all visual items of one prompt may keep together.
        layer: at the decoder site, how many layers of the LLM see the tokens first, at least 1, or
            which share of them, as in ``0.25``; at the vision site, how many blocks of the encoder
            do.
        schedule: in place of ``layer`` and the strategy's budget, the share of the original tokens
            that go on after each of several layers, as in ``{8: 0.5, 16: 0.25}``, or shares of the
            layers, as in ``{0.25: 0.5, 0.5: 0.25}``; to go on with 0 is legal at the decoder site.
            Kept as pairs in the order of the layers.
        flops: in place of the strategy's budget, the most FLOPs that the layers of the LLM may
            spend on the tokens of an item, if nothing is cut after this stage.
        prefill_ms: likewise, the most milliseconds, as measured on the model.
        price: what tokens cost; an attachment puts it in.

    Raises:
        PipelineError: if ``reducer`` is none, or ``layer`` and ``schedule`` do not suit the site.
        UnsupportedSite: if the strategy does not run there.
        BudgetError: if ``total`` or a share is out of range, or there are two budgets.
    """

    reducer: Reducer
    site: Site = "projector"
    total: int | None = None
    layer: float | None = None
    schedule: Mapping[float, float] | Sequence[tuple[float, float]] | None = None
    flops: float | None = None
    prefill_ms: float | None = None
    price: Price | None = field(default=None, compare=False, repr=False)

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
        others = (self.total, self.schedule, self.reducer.budget)
        if self.limit is not None and any(other is not None for other in others):
            raise BudgetError(
                f"two budgets at once: {self.limit} says how many tokens to keep. Leave out keep, "
                "keep_ratio, reduction, total and schedule."
            )
        for reducer in (self.reducer, *self.reducer.inner_reducers()):
            sites = reducer.record.sites
            if self.site not in sites:
                raise UnsupportedSite(
                    f"strategy {reducer.name!r} does not run at the site {self.site!r}; it runs "
                    f"at: {', '.join(sites)}."
                )
        if self.reducer.keep == 0 and self.site != "decoder":
            raise BudgetError(
                f"{self.reducer.name}: keep=0 would leave the LLM nothing to see of the image. "
                "Keep at least one token; dropping all is legal only at the decoder site."
            )
        if self.schedule is not None:
            object.__setattr__(self, "schedule", _schedule(self.schedule, self.site))
        if self.limit is not None and self.site in ("frames", "vision"):
            raise BudgetError(
                f"{self.limit} at the site {self.site!r}: it states what the LLM may spend, and "
                "how many of its tokens stand for one of the encoder's depends on the model. "
                "State it at the projector or decoder site."
            )
        self._check_depth()

    def _check_depth(self) -> None:
        if self.site in ("frames", "projector"):
            if self.layer is not None or self.schedule is not None:
                raise PipelineError(
                    f"layer and schedule say where inside the encoder (site: vision) or the LLM "
                    f"(site: decoder) a stage runs; this one runs at the site {self.site!r}."
                )
            return
        if self.layer is not None and self.schedule is not None:
            raise PipelineError("give layer or schedule, not both: a schedule names its layers.")
        if self.schedule is not None and (self.reducer.budget is not None or self.total):
            raise BudgetError(
                "two budgets at once: the schedule says how many tokens to keep. Leave out keep, "
                "keep_ratio, reduction and total."
            )
        if self.layer is not None:
            object.__setattr__(self, "layer", _check_layer("layer", self.layer, self.site))
        if self.site == "decoder" and self.layer is None and self.schedule is None:
            raise PipelineError(
                "a stage at the decoder site needs layer=2 (how many layers see the tokens first; "
                "layer=0.25 is a quarter of them) or schedule={8: 0.5, 16: 0.25}."
            )

    @property
    def relative(self) -> bool:
        """Whether the stage states shares of the LLM's depth; :meth:`within` makes them layers."""
        return not all(isinstance(place, int) for place in self._places)

    @property
    def _places(self) -> tuple[float, ...]:
        if self.schedule is not None:
            return tuple(dict(self.schedule))
        return () if self.layer is None else (self.layer,)

    @property
    def layers(self) -> tuple[int, ...]:
        """After how many layers the stage cuts, ascending; empty if it was not told.

        Raises:
            PipelineError: if it states shares of a depth that is not known.
        """
        if self.relative:
            raise PipelineError(
                f"{self.reducer.name}: {', '.join(map(str, self._places))} of the layers: which "
                "ones they are depends on the model. Stage.within(depth) tells."
            )
        return tuple(int(place) for place in self._places)

    @property
    def after(self) -> int | None:
        """After how many layers the stage cuts; None if it names none, or several in a schedule."""
        return None if self.layer is None else self.layers[0]

    def within(self, depth: int) -> Stage:
        """The stage in an LLM of ``depth`` layers: shares become layers, rounded half up.

        Raises:
            PipelineError: if two shares come to the same layer.
        """
        if not self.relative:
            return self
        half = Fraction(1, 2)
        layers = [max(1, floor(as_fraction("layer", p) * depth + half)) for p in self._places]
        if len(set(layers)) < len(layers):
            raise PipelineError(
                f"schedule: {', '.join(map(str, self._places))} of {depth} layers come to the "
                f"layers {', '.join(map(str, layers))}: leave one out, or space them further apart."
            )
        if self.schedule is None:
            return replace(self, layer=layers[0])
        return replace(self, schedule=dict(zip(layers, dict(self.schedule).values(), strict=True)))

    @property
    def limit(self) -> Budget | None:
        """What an item may cost, if that is how the budget is stated."""
        given = {name: getattr(self, name) for name in COSTS if getattr(self, name) is not None}
        return Budget(**given) if given else None

    def cost(self, tokens: int, kept: int) -> float:
        """What an item of ``tokens`` tokens costs if this stage keeps ``kept`` of them.

        Raises:
            BudgetError: if nothing says what a token costs.
        """
        if self.price is None:
            raise BudgetError(
                f"{self.reducer.name}: {self.limit}: what a token costs depends on the model. "
                "Attach the stage to one."
            )
        layer = (self.after or 0) if self.site == "decoder" else 0
        return self.price(tokens, 0, layer) + self.price(kept, layer, None)

    def at(self, layer: int) -> Stage:
        """The stage at one of its layers, with the budget that its schedule states for it."""
        if self.schedule is None:
            return self
        share = dict(self.schedule)[layer]
        budget = {"keep": 0} if share == 0 else {"keep_ratio": share}
        return replace(self, reducer=self.reducer.with_budget(**budget), layer=layer, schedule=None)

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
        total = self.total if total is None else total
        return replace(self, reducer=reducer, total=total, flops=None, prefill_ms=None)

    def require_budget(self) -> None:
        """Check that the stage knows how many tokens to keep.

        Raises:
            BudgetError: if neither the strategy nor ``total`` says so, or ``total`` cannot be
                shared because the strategy decides by itself.
        """
        if self.schedule is not None or self.limit is not None:
            return
        if self.total is None:
            self.reducer.require_budget()
        elif self.reducer.budget is None and self.reducer.decides_alone:
            raise BudgetError(
                f"{self.reducer.name} decides by itself how many tokens to keep, so "
                f"total={self.total} cannot be shared among items. Give it a budget."
            )

    def reducers(
        self,
        layouts: Sequence[Layout],
        prompts: Sequence[int],
        original: Sequence[int] | None = None,
    ) -> list[Reducer]:
        """The reducer for each item, with its share of ``total``.

        Args:
            layouts: the layout of each item.
            prompts: index of the prompt that each item belongs to.
            original: unprotected tokens of each item that ratios are of; those that it has if
                omitted.
        """
        free = [len(layout) - layout.protected_count for layout in layouts]
        if (limit := self.limit) is not None:
            return [self._solved(limit, layout) for layout in layouts]
        if self.total is None:
            budget = self.reducer.budget
            if original is None or budget is None or budget.keep is not None:
                return [self.reducer] * len(layouts)
            return [self.reducer.with_budget(keep=budget.count(n)) for n in original]
        self.require_budget()
        stated = {name: getattr(self.reducer, name) for name in BUDGET_FIELDS}
        budget = Budget(**stated, total=self.total)
        chosen: list[Reducer] = [self.reducer] * len(layouts)
        for prompt in dict.fromkeys(prompts):
            mine = [i for i, owner in enumerate(prompts) if owner == prompt]
            shares = budget.shares([free[i] for i in mine])
            for i, share in zip(mine, shares, strict=True):
                chosen[i] = self.reducer.with_budget(keep=share if free[i] else 1)
        return chosen

    def _solved(self, limit: Budget, layout: Layout) -> Reducer:
        """The reducer for an item that may cost so much; protected tokens are paid for first."""
        tokens, protected = len(layout), layout.protected_count
        solved = limit.solve(tokens - protected, lambda kept: self.cost(tokens, kept + protected))
        return self.reducer.with_budget(keep=max(1, solved.keep or 0))


@dataclass(frozen=True, kw_only=True)
class ItemOutcome:
    """What became of one packed item.

    Attributes:
        reduction: all stages composed; None where every stage kept all.
        stages: one entry for each stage.
    """

    reduction: Reduction | None
    stages: tuple[StageReceipt, ...]

    def then(self, other: ItemOutcome) -> ItemOutcome:
        """This outcome followed by one over the tokens that it left."""
        reduction = self.reduction or other.reduction
        if self.reduction is not None and other.reduction is not None:
            reduction = self.reduction.then(other.reduction)
        return ItemOutcome(reduction=reduction, stages=(*self.stages, *other.stages))


def join_outcomes(parts: Sequence[ItemOutcome]) -> ItemOutcome:
    """The outcome of an item that is several others end to end, each kept at its positions."""
    stages = tuple(
        replace(
            receipts[0],
            tokens_in=sum(receipt.tokens_in for receipt in receipts),
            tokens_out=sum(receipt.tokens_out for receipt in receipts),
            protected=sum(receipt.protected for receipt in receipts),
            reason="; ".join(dict.fromkeys(r.reason for r in receipts if r.reason)),
        )
        for receipts in zip(*(part.stages for part in parts), strict=True)
    )
    changed = next((part.reduction for part in parts if part.reduction is not None), None)
    if changed is None:
        return ItemOutcome(reduction=None, stages=stages)
    positions, assignment, outputs, sources = [], [], 0, 0
    for part in parts:
        if part.reduction is None:
            everyone = torch.arange(part.stages[0].tokens_in, device=changed.positions.device)
            kept = flows = everyone[None]
        else:
            kept, flows = part.reduction.positions, part.reduction.assignment
        positions.append(kept + sources)
        assignment.append(torch.where(flows < 0, flows, flows + outputs))
        outputs, sources = outputs + kept.shape[1], sources + flows.shape[1]
    reduction = Reduction(
        # Places alone: the features are those that the LLM reads.
        features=changed.features.new_empty(1, outputs, 0),
        positions=torch.cat(positions, dim=1),
        assignment=torch.cat(assignment, dim=1),
    )
    return ItemOutcome(reduction=reduction, stages=stages)


def keep_all_outcomes(
    stages: Sequence[Stage],
    layouts: Sequence[Layout],
    prompts: Sequence[int],
    original: Sequence[int] | None = None,
    *,
    earlier: Sequence[ItemOutcome] | None = None,
) -> list[ItemOutcome] | None:
    """The outcomes if budgets alone, and earlier stages, leave every item as it is, else None.

    Reads no tensor of the model: the keep-all path costs the device nothing.
    """
    receipts: list[list[StageReceipt]] = [[] for _ in layouts]
    for i, outcome in enumerate(earlier or ()):
        if outcome.reduction is not None:
            return None
        receipts[i].extend(outcome.stages)
    for stage in stages:
        for i, reducer in enumerate(stage.reducers(layouts, prompts, original)):
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
    stages: Sequence[Stage],
    packed: PackedTokens,
    prompts: Sequence[int],
    *,
    earlier: Sequence[ItemOutcome] | None = None,
    original: Sequence[int] | None = None,
) -> list[ItemOutcome]:
    """Apply stages one after another to packed items.

    Args:
        stages: all at the same place in the model.
        packed: the items.
        prompts: index of the prompt that each item belongs to, for budgets per prompt.
        earlier: what stages inside or before the encoder made of each item. Their reductions are
            applied here first, where the LLM reads.
        original: unprotected tokens of each item that ratios are of; those that it has if omitted.
    """
    composed: list[Reduction] = []
    receipts: list[list[StageReceipt]] = [[] for _ in packed.layouts]
    if earlier is not None and any(outcome.reduction is not None for outcome in earlier):
        composed = [
            outcome.reduction.on(packed.bucket([i]).features)
            if outcome.reduction is not None
            else Reduction.identity(packed.bucket([i]), reason=outcome.stages[-1].reason)
            for i, outcome in enumerate(earlier)
        ]
        packed = _outputs(packed, composed)
    for i, outcome in enumerate(earlier or ()):
        receipts[i].extend(outcome.stages)
    for number, stage in enumerate(stages):
        reductions = reduce_packed(packed, stage.reducers(packed.layouts, prompts, original))
        for i, reduction in enumerate(reductions):
            receipts[i].append(
                _stage_receipt(stage, packed.layouts[i], reduction.kept, reduction.reason)
            )
        if number + 1 < len(stages):
            packed = _outputs(packed, reductions)
        composed = (
            [done.then(more) for done, more in zip(composed, reductions, strict=True)]
            if composed
            else reductions
        )
    if not composed:
        return list(earlier or ())
    return [
        ItemOutcome(
            reduction=reduction if _changes_anything(reduction) else None,
            stages=tuple(done),
        )
        for reduction, done in zip(composed, receipts, strict=True)
    ]


def _outputs(packed: PackedTokens, reductions: Sequence[Reduction]) -> PackedTokens:
    items = [reduction.tokens(packed.bucket([i]))[0] for i, reduction in enumerate(reductions)]
    return PackedTokens.from_items(items)


def _schedule(given: object, site: Site) -> tuple[tuple[float, float], ...]:
    if isinstance(given, Mapping):
        given = tuple(given.items())
    if not isinstance(given, tuple | list) or not given:
        raise PipelineError(
            f"a schedule maps layers to shares, as in {{8: 0.5, 16: 0.25}}, got {given!r}."
        )
    for entry in given:
        if not isinstance(entry, tuple | list) or len(entry) != 2:
            raise PipelineError(
                "a schedule maps layers to shares, as in {8: 0.5, 16: 0.25}, got the entry "
                f"{entry!r}."
            )
    pairs = sorted(
        ((_check_layer("schedule", layer, site), share) for layer, share in given),
        key=lambda p: p[0],
    )
    if len({layer for layer, _ in pairs}) < len(pairs):
        raise PipelineError(f"schedule names a layer twice: {given!r}.")
    if len({isinstance(layer, int) for layer, _ in pairs}) > 1:
        raise PipelineError(
            f"schedule names layers and shares of them at once: {given!r}. Use one of the two."
        )
    before: float = 1
    for layer, share in pairs:
        if share is None:
            raise BudgetError(f"schedule: layer {layer} has no share. Give a number in [0, 1].")
        if share != 0 or site != "decoder":
            try:
                Budget(keep_ratio=share)
            except BudgetError as error:
                raise BudgetError(f"schedule: layer {layer}: {error}") from error
        if float(share) > float(before):
            raise BudgetError(
                f"schedule: after layer {layer} a share of {share} is more than the {before} that "
                "an earlier layer leaves. Shares are of the original tokens."
            )
        before = share
    return tuple(pairs)


def _check_layer(name: str, layer: object, site: Site) -> float:
    """A number of layers, or a share of them."""
    if isinstance(layer, Integral) and not isinstance(layer, bool) and int(layer) >= 1:
        return int(layer)
    if isinstance(layer, Real) and not isinstance(layer, Integral) and 0 < float(layer) < 1:
        if site != "decoder":
            raise PipelineError(
                f"{name}: {layer} of the layers is served at the decoder site. Name whole ones at "
                f"the site {site!r}."
            )
        return layer if isinstance(layer, Fraction) else float(layer)  # type: ignore[return-value]
    raise PipelineError(
        f"{name}: {layer!r} is no layer. Layers count from 1: after the first layer is 1. A share "
        "of them lies between 0 and 1."
    )


def _stage_receipt(stage: Stage, layout: Layout, kept: int, reason: str) -> StageReceipt:
    spending = None
    for unit in COSTS:
        limit = getattr(stage, unit)
        if limit is not None and stage.price is not None:
            spending = Spending(unit=unit, limit=limit, spent=stage.cost(len(layout), kept))
    return StageReceipt(
        strategy=stage.reducer.name,
        site=stage.site,
        tokens_in=len(layout),
        tokens_out=kept,
        protected=layout.protected_count,
        layer=stage.after,
        from_step=stage.reducer.from_step,
        reason=reason,
        spending=spending,
    )


def _changes_anything(reduction: Reduction) -> bool:
    return reduction.kept < reduction.source_count or not reduction.gathers
