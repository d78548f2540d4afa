"""What a comparison runs: pipelines from files, or from a sweep in one, and the controls.

A sweep is a pipeline file with the key ``sweep`` beside ``model`` and ``reduce``: key paths, each
with the values that it takes in turn; all combinations are run. A value of ``reduce.N.strategy``
may be a shell-style pattern: every registered strategy of that name that runs at the stage's site.

    model: {path: "testbed:b", dtype: float32, device: cpu}
    reduce:
      - {strategy: lftr, site: projector, reduction: 8}
    sweep:
      reduce.0.strategy: [lftr, divprune, "fast*"]
      reduce.0.reduction: [4, 8, 16]
    references: [divprune]
    data: testbed,seed=30101,scenes=130
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from omegaconf import OmegaConf

from tokenreduce.api import list_strategies
from tokenreduce.config import load_pipeline
from tokenreduce.errors import PipelineError, TokenReduceError
from tokenreduce.pipeline import ModelSettings, Pipeline
from tokenreduce.plugins import installed
from tokenreduce.reducer import BUDGET_FIELDS
from tokenreduce.stage import Stage
from tokenreduce_integrations.evaluation.schema import Refusal

CONTROLS: Final = ("random", "uniform", "avg-pool")
UNREDUCED: Final = "unreduced"

_OWN_KEYS: Final = ("sweep", "references", "data")
_STRATEGY_KEY: Final = re.compile(r"reduce[.\[](\d+)\]?\.strategy")
_NAMED: Final = re.compile(rf"reduce[.\[]\d+\]?\.(strategy|site|{'|'.join(BUDGET_FIELDS)})")


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One pipeline of a comparison.

    Attributes:
        name: unique.
        role: ``"strategy"``, ``"control"`` or ``"unreduced"``.
        pipeline: with a model.
        required: whether a pipeline that cannot run stops the comparison; those of a sweep are
            listed as refused instead.
    """

    name: str
    role: str
    pipeline: Pipeline
    required: bool = False

    @property
    def strategy(self) -> str:
        """Names of the strategies."""
        if self.role == UNREDUCED:
            return ""
        return " + ".join(stage.reducer.name for stage in self.pipeline.stages)

    @property
    def sites(self) -> tuple[str, ...]:
        """Of the stages."""
        return tuple(str(stage.site) for stage in self.pipeline.stages)

    @property
    def budget(self) -> str:
        """Of the stages, as written."""
        if self.role == UNREDUCED:
            return ""
        return " + ".join(map(budget_of, self.pipeline.stages))

    @property
    def model(self) -> ModelSettings:
        """How its model is loaded."""
        if self.pipeline.model is None:
            raise PipelineError(f"{self.name}: names no model: add 'model: {{path: ...}}'.")
        return self.pipeline.model


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a comparison runs.

    Attributes:
        entries: the pipelines that were asked for, then the unreduced models and the controls that
            these call for.
        refused: what a sweep asked for and cannot be made.
        references: strategies that every other is held against, beside the controls.
        data: the source of the questions that the file names; None if it names none.
    """

    entries: tuple[Entry, ...]
    refused: tuple[Refusal, ...] = ()
    references: tuple[str, ...] = ()
    data: str | None = None


def load_plan(sources: Sequence[str], overrides: Sequence[str] = ()) -> Plan:
    """Read pipelines and sweeps.

    Args:
        sources: pipeline files, presets, or files with a sweep.
        overrides: as for :func:`tokenreduce.load_pipeline`, applied to each.

    Raises:
        PipelineError: if a source is malformed, names no model, or two have one name.
        TokenReduceError: as for :func:`tokenreduce.load_pipeline`.
    """
    entries: list[Entry] = []
    refused: list[Refusal] = []
    references: list[str] = []
    data = None
    for source in sources:
        document = _sweep_document(source)
        if document is None:
            pipeline = load_pipeline(source, overrides)
            name = Path(source).stem
            entries.append(Entry(name=name, role="strategy", pipeline=pipeline, required=True))
            continue
        own = {key: document.pop(key) for key in _OWN_KEYS if key in document}
        references += own.get("references") or ()
        data = own.get("data", data)
        for found in _swept(source, document, own["sweep"], overrides):
            (entries if isinstance(found, Entry) else refused).append(found)  # type: ignore[arg-type]
    if not entries:
        why = f" Of the sweep, {refused[0].name}: {refused[0].reason}" if refused else ""
        raise PipelineError(f"nothing to compare: give pipeline files, or one with a 'sweep'.{why}")
    entries = [_as_control(entry) for entry in entries]
    named = _distinct([*entries, *_unreduced(entries)])
    return Plan(
        entries=(*named, *controls_for(named, (*CONTROLS, *references))),
        refused=tuple(refused),
        references=tuple(dict.fromkeys(references)),
        data=data,
    )


def budget_of(stage: Stage) -> str:
    """A stage's budget as it was written; empty if the strategy decides by itself."""
    if stage.schedule is not None:
        shares = (f"{layer}: {float(share):g}" for layer, share in dict(stage.schedule).items())
        return f"schedule={{{', '.join(shares)}}}"
    given = {key: getattr(stage.reducer, key) for key in BUDGET_FIELDS}
    given |= {key: getattr(stage, key) for key in ("total", "flops", "prefill_ms")}
    return ", ".join(f"{key}={_number(value)}" for key, value in given.items() if value is not None)


def controls_for(entries: Sequence[Entry], strategies: Iterable[str]) -> list[Entry]:
    """The controls that entries lack: one for each model, budget and strategy.

    Only a pipeline of one stage before the LLM states a budget that a control can be given; others
    get theirs when their realised tokens are known.
    """
    have = {_key(entry) for entry in entries if entry.role != UNREDUCED}
    made: list[Entry] = []
    for entry in entries:
        if entry.role == UNREDUCED or not has_plain_budget(entry):
            continue
        [stage] = entry.pipeline.stages
        budget = {key: getattr(stage.reducer, key) for key in BUDGET_FIELDS}
        for strategy in dict.fromkeys(strategies):
            control = control_of(entry, strategy, {k: v for k, v in budget.items() if v})
            if _key(control) not in have:
                have.add(_key(control))
                made.append(control)
    return made


def control_of(entry: Entry, strategy: str, budget: Mapping[str, Any]) -> Entry:
    """A control for an entry's model with a given budget, at the projector site."""
    pipeline = load_pipeline({"reduce": [{"strategy": strategy, **budget}]})
    pipeline = replace(pipeline, model=entry.pipeline.model)
    made = _as_control(Entry(name="", role="strategy", pipeline=pipeline))
    suffix = entry.name.partition(" | ")[2]
    name = f"{strategy} {made.budget}" + (f" | {suffix}" if suffix else "")
    return replace(made, name=name)


def has_plain_budget(entry: Entry) -> bool:
    """Whether the entry states how many tokens the LLM is given."""
    stages = entry.pipeline.stages
    return (
        len(stages) == 1
        and stages[0].site in ("projector", "vision", "frames")
        and stages[0].reducer.budget is not None
    )


def _sweep_document(source: str) -> dict[str, Any] | None:
    """The content of a file with a sweep; None for any other pipeline."""
    path = Path(source)
    try:
        if path.suffix not in (".yaml", ".yml") or not path.is_file():
            return None
        # Interpolations are left to the pipelines that are made of it.
        document = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    except Exception as error:
        # Whatever is wrong with it, the reader of pipelines says so better.
        load_pipeline(source)
        raise PipelineError(f"{source}: cannot be read: {error}.") from error
    if not isinstance(document, dict) or "sweep" not in document:
        return None
    return {str(key): value for key, value in document.items()}


def _swept(
    source: str, document: Mapping[str, Any], sweep: object, overrides: Sequence[str]
) -> Iterator[Entry | Refusal]:
    if (
        not isinstance(sweep, dict)
        or not sweep
        or not all(isinstance(values, list) and values for values in sweep.values())
    ):
        raise PipelineError(
            f"{source}: sweep: must map key paths to lists of values, as in "
            "{reduce.0.reduction: [4, 8, 16]}."
        )
    base = load_pipeline(document, overrides)
    for values in itertools.product(*sweep.values()):
        chosen = dict(zip(map(str, sweep), values, strict=True))
        for concrete in _strategies_of(base, chosen):
            yield _made(source, document, concrete, overrides)


def _strategies_of(base: Pipeline, chosen: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """One combination for each strategy that a pattern stands for."""
    for key, value in chosen.items():
        match = _STRATEGY_KEY.fullmatch(key)
        if match is None or not isinstance(value, str) or not re.search(r"[*?\[]", value):
            continue
        number = int(match[1])
        site = chosen.get(key.removesuffix("strategy") + "site", base.stages[number].site)
        strategies = installed().strategies
        for name in list_strategies(value, site=site):
            if not strategies[name].wraps:
                yield from _strategies_of(base, {**chosen, key: name})
        return
    yield chosen


def _made(
    source: str, document: Mapping[str, Any], chosen: Mapping[str, Any], overrides: Sequence[str]
) -> Entry | Refusal:
    values = [f"{key}={json.dumps(value)}" for key, value in chosen.items()]
    rest = [f"{key}={value}" for key, value in chosen.items() if not _NAMED.fullmatch(key)]
    suffix = f" | {', '.join(rest)}" if rest else ""
    try:
        pipeline = load_pipeline(document, [*overrides, *values])
    except TokenReduceError as error:
        names = [str(value) for key, value in chosen.items() if _STRATEGY_KEY.fullmatch(key)]
        sites = [str(value) for key, value in chosen.items() if key.endswith(".site")]
        budget = [
            f"{key.rpartition('.')[2]}={value}"
            for key, value in chosen.items()
            if not key.endswith((".strategy", ".site"))
        ]
        name = " ".join([*names, *budget])
        return Refusal(name=name, strategy=" + ".join(names), sites=tuple(sites), reason=str(error))
    entry = Entry(name="", role="strategy", pipeline=replace(pipeline, source=source))
    parts = [
        stage.reducer.name + ("" if stage.site == "projector" else f"@{stage.site}")
        for stage in pipeline.stages
    ]
    name = f"{' + '.join(parts)} {entry.budget}".rstrip() + suffix
    return replace(entry, name=name)


def _unreduced(entries: Sequence[Entry]) -> list[Entry]:
    """The unmodified model of each entry, once."""
    made: list[Entry] = []
    for entry in entries:
        if any(entry.model == other.model for other in made):
            continue
        pipeline = load_pipeline({"reduce": [{"strategy": "uniform", "reduction": 1}]})
        suffix = entry.name.partition(" | ")[2]
        name = f"{UNREDUCED} | {suffix}" if suffix else UNREDUCED
        if any(other.name == name for other in made):
            name = f"{UNREDUCED} | {entry.model.path} {len(made)}"
        made.append(Entry(name=name, role=UNREDUCED, pipeline=replace(pipeline, model=entry.model)))
    return made


def _as_control(entry: Entry) -> Entry:
    """The entry, marked if it is a control."""
    stages = entry.pipeline.stages
    plain = len(stages) == 1 and stages[0].site == "projector"
    if plain and entry.strategy in CONTROLS:
        return replace(entry, role="control")
    return entry


def _distinct(entries: Sequence[Entry]) -> list[Entry]:
    names = [entry.name for entry in entries]
    for name in names:
        if names.count(name) > 1:
            raise PipelineError(f"two pipelines are called {name!r}: rename one of the files.")
    return list(entries)


def _key(entry: Entry) -> tuple[Any, ...]:
    return (entry.strategy, entry.sites, entry.budget, repr(entry.model))


def _number(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
