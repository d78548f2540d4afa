"""Pipelines on the same questions: accuracy with paired intervals and tests, tokens and cost."""

from __future__ import annotations

import json
import platform
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from tokenreduce.attachment import Attachment, attach, find_adapter, find_loader
from tokenreduce.config import dump_pipeline
from tokenreduce.errors import EvaluationError, TokenReduceError, UncountedOperator
from tokenreduce.pipeline import ModelSettings
from tokenreduce_integrations.accounting.flops import count_flops
from tokenreduce_integrations.accounting.timing import Times, median_times, time_answer
from tokenreduce_integrations.evaluation import evaluating
from tokenreduce_integrations.evaluation.answering import Answerer, AttachedAnswerer, encode_batch
from tokenreduce_integrations.evaluation.cached import SITES, CachedAnswerer, Captured
from tokenreduce_integrations.evaluation.data import Questions
from tokenreduce_integrations.evaluation.evaluating import Processes
from tokenreduce_integrations.evaluation.planning import (
    CONTROLS,
    UNREDUCED,
    Entry,
    Plan,
    control_of,
    has_plain_budget,
)
from tokenreduce_integrations.evaluation.schema import (
    COMPARISON_FILE,
    Comparison,
    Cost,
    Data,
    Estimate,
    Method,
    Refusal,
    Row,
    Run,
    Versus,
)
from tokenreduce_integrations.evaluation.statistics import (
    CONFIDENCE,
    FLIPS,
    RESAMPLES,
    Bootstrap,
    holm,
    mcnemar,
    sign_flips,
)
from tokenreduce_integrations.evaluation.summaries import (
    bootstrap_of,
    correct_of,
    kinds_of,
    token_counts,
)

SEED: Final = 0
COST_ROUNDS: Final = 5

#: Generated tokens that the time of decoding is the mean of.
_DECODED: Final = 4


@dataclass(frozen=True, kw_only=True)
class Options:
    """How a comparison is made.

    Attributes:
        batch_size: questions at once.
        max_new_tokens: longest answer; None for that of the data.
        scoring: see :func:`~.evaluating.is_correct`.
        cost_rounds: interleaved measurements of cost; 0 for none.
    """

    batch_size: int = evaluating.BATCH_SIZE
    max_new_tokens: int | None = None
    scoring: str = "exact"
    cost_rounds: int = COST_ROUNDS


@dataclass(frozen=True)
class _Answered:
    """An entry with its rows."""

    entry: Entry
    digest: str
    rows: list[Row]


def compare(
    plan: Plan,
    questions: Questions,
    folder: Path,
    options: Options,
    *,
    processes: Processes | None = None,
    progress: Callable[[float], None] | None = None,
) -> Comparison:
    """Evaluate every entry of a plan, and hold them against each other.

    Rows are written to ``folder`` as they come: a comparison that was interrupted is continued.

    Args:
        plan: what to run.
        questions: what to ask.
        folder: where results go.
        options: how.
        processes: shares questions among processes; all of them call this.
        progress: called with the share of entries that are done.

    Raises:
        EvaluationError: if the folder holds results of another comparison.
        TokenReduceError: if a pipeline that is not part of a sweep cannot run.
    """
    processes = processes or Processes()
    answered: list[_Answered] = []
    refused = list(plan.refused)
    costs: dict[str, Cost] = {}
    matched: dict[str, str] = {}
    models: list[ModelSettings] = []
    for entry in plan.entries:
        if entry.model not in models:
            models.append(entry.model)
    for settings in models:
        mine = [entry for entry in plan.entries if entry.model == settings]
        bench = _Bench(settings, mine, questions, folder, options, processes)
        queue = list(mine)
        while queue:
            entry = queue.pop(0)

            def share(of_this: float, before: int = len(answered) + len(refused)) -> None:
                if progress is not None:
                    progress(min(1.0, (before + of_this) / (len(plan.entries) + len(plan.refused))))

            try:
                done = bench.run(entry, share)
            except EvaluationError:
                # Files that do not belong together: nothing that a strategy can help.
                raise
            except TokenReduceError as error:
                if entry.required or entry.role == UNREDUCED:
                    raise
                refused.append(_refusal(entry, error))
                continue
            answered.append(done)
            if entry.role == "strategy" and not has_plain_budget(entry):
                known = {one.name for one in (*mine, *queue)}
                late = _matched_controls(done, plan.references)
                matched[entry.name] = late[0].budget
                queue += [control for control in late if control.name not in known]
        if options.cost_rounds and processes.is_main:
            costs |= bench.costs([one.entry for one in answered if one.entry.model == settings])
    comparison = _document(
        questions, options, answered, tuple(refused), costs, matched, plan.references
    )
    if processes.is_main:
        text = json.dumps(comparison.as_dict(), indent=1, ensure_ascii=False) + "\n"
        (folder / COMPARISON_FILE).write_text(text, encoding="utf-8")
    processes.wait()
    return comparison


class _Bench:
    """One model on which pipelines are put in turn."""

    def __init__(
        self,
        settings: ModelSettings,
        entries: Sequence[Entry],
        questions: Questions,
        folder: Path,
        options: Options,
        processes: Processes,
    ) -> None:
        self._settings = settings
        self._entries = entries
        self._questions = questions
        self._folder = folder
        self._options = options
        self._processes = processes
        here = processes.on_own_device(settings)
        self.model, self.processor = find_loader(settings.adapter)(here, ())
        self._longest = (
            options.max_new_tokens or questions.answer_tokens or evaluating.MAX_NEW_TOKENS
        )

    def run(self, entry: Entry, progress: Callable[[float], None]) -> _Answered:
        """Evaluate an entry, or read what was evaluated before.

        Args:
            entry: the entry.
            progress: called with the share that is done.

        Raises:
            TokenReduceError: if it cannot run.
        """
        stages, reduced = entry.pipeline.stages, entry.role != UNREDUCED
        questions = len(self._questions.samples)
        self._check(entry)
        captured = self._captured if all(stage.site in SITES for stage in stages) else None
        settings = evaluating.settings_of(
            batch_size=self._options.batch_size,
            max_new_tokens=self._longest,
            scoring=self._options.scoring,
            reduced=reduced,
            cached=captured is not None,
            device=self._settings.torch_device.type,
        )
        header = evaluating.header_of(entry.pipeline, self._questions, settings)
        with ExitStack() as undo:

            def answerer() -> Answerer:
                if captured is not None:
                    return CachedAnswerer(captured, stages, reduced=reduced)
                run = undo.enter_context(self._attached(entry))
                run.enabled = reduced
                return AttachedAnswerer(
                    self.model, self.processor, run, max_new_tokens=self._longest
                )

            rows = evaluating.evaluate(
                answerer,
                self._questions,
                header,
                self._folder / rows_file(entry.name),
                processes=self._processes,
                progress=lambda done: progress(done * self._processes.count / questions),
            )
        return _Answered(entry, header.pipeline_digest, rows)

    def costs(self, entries: Sequence[Entry]) -> dict[str, Cost]:
        """What one prompt costs, by the name of the entry; measured in turn, round after round."""
        inputs = encode_batch(self.processor, self._questions.samples[:1], self.model.device)
        times: dict[str, list[Times]] = {entry.name: [] for entry in entries}
        # The first round warms up.
        for number in range(self._options.cost_rounds + 1):
            for entry in entries:
                with self._attached(entry) as run:
                    spent = time_answer(self.model, inputs, _DECODED, run)
                if number:
                    times[entry.name].append(spent)
        found = {}
        for entry in entries:
            with self._attached(entry) as run:
                flops = self._flops(inputs)
                found[entry.name] = Cost(
                    flops=flops,
                    kv_bytes=run.receipt.kv_bytes,
                    times_ms={
                        name: round(value, 3)
                        for name, value in median_times(times[entry.name]).as_dict().items()
                    },
                    decode_tokens=_DECODED - 1,
                )
        return found

    def _flops(self, inputs: Mapping[str, Any]) -> dict[str, int]:
        """FLOPs of the first token by part; nothing where an operator cannot be counted."""

        def first_token() -> None:
            self.model.generate(**inputs, do_sample=False, num_beams=1, max_new_tokens=1)

        try:
            flops = count_flops(self.model, first_token)
        except UncountedOperator:
            return {}
        return {**flops.parts, "total": flops.total}

    def _check(self, entry: Entry) -> None:
        joint = self._settings.joint_encoder
        adapter = find_adapter(self.model)
        adapter.check(self.model, entry.pipeline.stages, self.processor, joint)

    def _attached(self, entry: Entry) -> Attachment:
        joint = self._settings.joint_encoder
        return attach(self.model, entry.pipeline, processor=self.processor, joint_encoder=joint)

    @cached_property
    def _captured(self) -> Captured | None:
        """What pipelines share, if this model and these questions allow it."""
        # What is captured stays in memory: only data that is made for it is answered that way.
        if self._longest != 1 or self._questions.answer_tokens != 1:
            return None
        needs: dict[str, None] = {}
        for entry in self._entries:
            try:
                self._check(entry)
            except TokenReduceError:
                continue
            for stage in entry.pipeline.stages:
                if stage.site == "projector":
                    needs |= dict.fromkeys(stage.reducer.needs)
        captured = Captured(self.model, self.processor, tuple(needs), self._settings.joint_encoder)
        try:
            captured.prompts(next(evaluating.batches(self._questions, self._options.batch_size)))
        except EvaluationError:
            return None
        return captured


def rows_file(name: str) -> str:
    """The file of a run's rows, relative to the folder of the comparison."""
    return f"runs/{re.sub(r'[^A-Za-z0-9@=.+-]+', '_', name)}.jsonl"


def pareto_front(runs: Sequence[Run], cost_of: Callable[[Run], float | None]) -> tuple[str, ...]:
    """Runs that no other one beats in accuracy at equal or lower cost, by ascending cost."""
    known = [(cost, run) for run in runs if (cost := cost_of(run)) is not None]
    front: list[str] = []
    best = -1.0
    for _, run in sorted(known, key=lambda pair: (pair[0], -pair[1].accuracy.value)):
        if run.accuracy.value > best:
            best = run.accuracy.value
            front.append(run.name)
    return tuple(front)


#: What accuracy is held against, and where a run says it.
COSTS: Final[Mapping[str, Callable[[Run], float | None]]] = {
    "tokens": lambda run: run.tokens.layer_average,
    "flops": lambda run: run.cost.flops.get("total") if run.cost else None,
    "time": lambda run: run.cost.times_ms.get("first_token") if run.cost else None,
}


def device_name() -> str:
    """The machine, in words."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{platform.machine()} CPU, {torch.get_num_threads()} thread(s)"


def _document(
    questions: Questions,
    options: Options,
    answered: Sequence[_Answered],
    refused: tuple[Refusal, ...],
    costs: Mapping[str, Cost],
    matched: Mapping[str, str],
    references: Sequence[str],
) -> Comparison:
    answered = sorted(answered, key=lambda one: one.entry.role != UNREDUCED)
    bootstrap = bootstrap_of(answered[0].rows, seed=SEED)
    others = {one.entry.name: _comparators(one, answered, matched, references) for one in answered}
    versus = _all_versus(answered, others, bootstrap)
    runs = []
    for one in answered:
        entry, correct = one.entry, correct_of(one.rows)
        whole = next(iter(others[entry.name]), None)
        runs.append(
            Run(
                name=entry.name,
                role=entry.role,
                strategy=entry.strategy,
                sites=() if entry.role == UNREDUCED else entry.sites,
                budget=entry.budget,
                pipeline=dump_pipeline(entry.pipeline),
                digest=one.digest,
                rows=rows_file(entry.name),
                model=entry.model.path,
                accuracy=_rounded(bootstrap.macro(correct)),
                micro=_rounded(bootstrap.micro(correct)),
                share=None
                if whole is None
                else _rounded(bootstrap.share(correct, correct_of(whole.rows))),
                kinds={
                    name: replace(kind, accuracy=round(kind.accuracy, 4))
                    for name, kind in kinds_of(one.rows, bootstrap).items()
                },
                tokens=token_counts(one.rows),
                cost=costs.get(entry.name),
                versus=versus[entry.name],
            )
        )
    return Comparison(
        data=Data(
            source=questions.source,
            digest=questions.digest,
            modality=", ".join(sorted({sample.modality for sample in questions.samples})),
            samples=len(questions.samples),
            groups=len(questions.groups),
            folder=questions.folder,
        ),
        method=Method(
            confidence=CONFIDENCE,
            resamples=RESAMPLES,
            flips=0 if bootstrap.independent else FLIPS,
            seed=SEED,
            independent=bootstrap.independent,
            correction="holm",
            cost_rounds=options.cost_rounds,
        ),
        device=device_name(),
        versions=evaluating.versions(),
        runs=tuple(runs),
        refused=refused,
        pareto={name: pareto_front(runs, cost_of) for name, cost_of in COSTS.items()},
    )


def _comparators(
    one: _Answered,
    answered: Sequence[_Answered],
    matched: Mapping[str, str],
    references: Sequence[str],
) -> list[_Answered]:
    """The unreduced run of the same model, then controls and references of the same budget."""
    if one.entry.role == UNREDUCED:
        return []
    budget = matched.get(one.entry.name, one.entry.budget)
    same = [other for other in answered if other.entry.model == one.entry.model]
    chosen = [other for other in same if other.entry.role == UNREDUCED]
    for name in dict.fromkeys((*CONTROLS, *references)):
        chosen += [
            other
            for other in same
            if other is not one
            and other.entry.strategy == name
            and other.entry.sites == ("projector",)
            and other.entry.budget == budget
        ]
    return chosen


def _all_versus(
    answered: Sequence[_Answered],
    others: Mapping[str, Sequence[_Answered]],
    bootstrap: Bootstrap,
) -> dict[str, tuple[Versus, ...]]:
    """Every paired comparison, with p-values corrected for all of them."""
    pairs = [(one, other) for one in answered for other in others[one.entry.name]]
    correct = {one.entry.name: correct_of(one.rows) for one in answered}
    mine = [(correct[one.entry.name], correct[other.entry.name]) for one, other in pairs]
    wins = [int((a & ~b).sum()) for a, b in mine]
    losses = [int((b & ~a).sum()) for a, b in mine]
    if bootstrap.independent:
        values = [mcnemar(w, n) for w, n in zip(wins, losses, strict=True)]
    elif pairs:
        values = sign_flips(
            np.stack([bootstrap.differences(a, b) for a, b in mine]), seed=SEED
        ).tolist()
    else:
        values = []
    found: dict[str, list[Versus]] = {one.entry.name: [] for one in answered}
    corrected = holm(values)
    for i, (one, other) in enumerate(pairs):
        found[one.entry.name].append(
            Versus(
                other=other.entry.name,
                difference=_rounded(bootstrap.difference(*mine[i])),
                wins=wins[i],
                losses=losses[i],
                test="mcnemar" if bootstrap.independent else "sign-flip",
                p=_significant(values[i]),
                p_holm=_significant(corrected[i]),
            )
        )
    return {name: tuple(entries) for name, entries in found.items()}


def _matched_controls(done: _Answered, references: Sequence[str]) -> list[Entry]:
    """Controls that leave the LLM as many tokens as a pipeline did, averaged over its layers."""
    tokens = token_counts(done.rows)
    share = round(tokens.layer_average / tokens.tokens_in, 4)
    names = dict.fromkeys((*CONTROLS, *references))
    return [control_of(done.entry, name, {"keep_ratio": share}) for name in names]


def _refusal(entry: Entry, error: TokenReduceError) -> Refusal:
    return Refusal(name=entry.name, strategy=entry.strategy, sites=entry.sites, reason=str(error))


def _rounded(estimate: Estimate) -> Estimate:
    return Estimate(
        value=round(estimate.value, 4), low=round(estimate.low, 4), high=round(estimate.high, 4)
    )


def _significant(value: float) -> float:
    return float(f"{value:.3g}")
