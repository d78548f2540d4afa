"""Which strategies can run on a model, why others cannot, and what evidence there is.

Nothing of a model but its configuration is read. Evidence is what ships with the package: the
comparisons that ``tokenreduce compare`` made on the testbed.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final

from torch import nn

from tokenreduce.api import create_strategy
from tokenreduce.attachment import ModelAdapter, find_adapter
from tokenreduce.capabilities import SITES, Site, StrategyRecord
from tokenreduce.errors import BudgetError, EvaluationError, TokenReduceError, did_you_mean
from tokenreduce.pipeline import ModelSettings
from tokenreduce.plugins import installed
from tokenreduce.stage import Stage
from tokenreduce_integrations.evaluation.schema import Comparison, Estimate, Run, read_comparison
from tokenreduce_integrations.transformers.loading import load_skeleton

CONFIG: Final = "config.json"
EVIDENCE: Final = Path(__file__).parent / "evidence"

#: After how many layers of the LLM a strategy is checked at the decoder site: FastV's choice.
DECODER_LAYER: Final = 2

_REDUCTION: Final = 8.0


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """How a strategy did in one comparison.

    Attributes:
        source: the model and the data.
        reduction: how many times fewer tokens the run had.
        accuracy: of the run; of one type of question if a task was named.
        unreduced: the same of the model with all tokens.
        interval: of the accuracy over all types.
    """

    source: str
    reduction: float
    accuracy: float
    unreduced: float
    interval: Estimate

    @property
    def share(self) -> float:
        """Accuracy as a share of the unreduced one."""
        return self.accuracy / self.unreduced if self.unreduced else 0.0


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A strategy at a site of a model.

    Attributes:
        strategy: its name.
        site: where.
        reason: why it cannot run; empty if it can.
        evidence: of the nearest reduction, by comparison.
    """

    strategy: str
    site: str
    reason: str = ""
    evidence: tuple[Evidence, ...] = ()

    @property
    def share(self) -> float:
        """Mean share of the unreduced accuracy; below everything without evidence."""
        return statistics.fmean(e.share for e in self.evidence) if self.evidence else -1.0


def choose(
    model: str,
    budget: Mapping[str, Any],
    *,
    task: str | None = None,
    modality: str = "image",
    joint_encoder: str | None = None,
    tokens: int | None = None,
) -> list[Choice]:
    """Every registered strategy at each of its sites: those that can run first, best first.

    Args:
        model: a folder, a ``config.json``, a hub name, or ``testbed:b``.
        budget: exactly one of ``keep``, ``keep_ratio`` and ``reduction``.
        task: order by the accuracy on this type of question.
        modality: of the evidence: ``"image"`` or ``"video"``.
        joint_encoder: as for :func:`tokenreduce.attach`.
        tokens: visual tokens of a picture, for evidence on a budget of ``keep``; what the
            configuration says if omitted.

    Raises:
        PipelineError: if the configuration cannot be read.
        BudgetError: if the budget is out of range.
        EvaluationError: if no evidence has such a task.
        UnsupportedModel: if no adapter serves the model.
    """
    path = Path(model)
    folder = str(path.parent) if path.name == CONFIG else model
    skeleton = load_skeleton(ModelSettings(path=folder))
    adapter = find_adapter(skeleton)
    # A budget that no strategy could take is an error of the caller.
    create_strategy("uniform", **budget)
    if budget.get("keep") == 0:
        raise BudgetError("keep=0 leaves nothing to see: give the number of tokens to keep.")
    reduction = _reduction(budget, tokens or getattr(skeleton.config, "image_seq_length", None))
    documents = [document for document in evidence() if document.data.modality == modality]
    _require_task(task, documents)
    found = []
    for record in installed().strategies.values():
        if record.wraps:
            continue
        for site in (site for site in SITES if site in record.sites):
            if site == "frames" and modality != "video":
                continue
            reason = _reason(adapter, skeleton, folder, record, site, budget, joint_encoder)
            known = () if reason else _evidence_of(record.name, site, reduction, task, documents)
            found.append(Choice(strategy=record.name, site=site, reason=reason, evidence=known))
    return sorted(found, key=lambda choice: (bool(choice.reason), -choice.share, choice.strategy))


@cache
def evidence() -> tuple[Comparison, ...]:
    """The comparisons that ship with the package."""
    return tuple(read_comparison(file) for file in sorted(EVIDENCE.glob("*.json")))


def _reduction(budget: Mapping[str, Any], tokens: int | None) -> float:
    """How many times fewer tokens a budget means."""
    if "reduction" in budget:
        return float(budget["reduction"])
    if "keep_ratio" in budget:
        return 1 / float(budget["keep_ratio"])
    return tokens / float(budget["keep"]) if tokens else _REDUCTION


def _reason(
    adapter: ModelAdapter,
    skeleton: nn.Module,
    model: str,
    record: StrategyRecord,
    site: Site,
    budget: Mapping[str, Any],
    joint_encoder: str | None,
) -> str:
    """Why a strategy cannot run; empty if it can."""
    if record.needs_weights:
        return "needs trained weights from a file of yours"
    try:
        layer = DECODER_LAYER if site == "decoder" else None
        stage = Stage(reducer=create_strategy(record.name, **budget), site=site, layer=layer)
        stage.require_budget()
        adapter.check(skeleton, (stage,), model, joint_encoder)
    except TokenReduceError as error:
        # The list of what would work is what is being made here.
        return str(error).partition(" What would work:")[0]
    return ""


def _require_task(task: str | None, documents: Sequence[Comparison]) -> None:
    known = {kind for document in documents for run in document.runs for kind in run.kinds}
    if task is not None and task not in known:
        raise EvaluationError(
            f"no evidence on questions of the type {task!r}. {did_you_mean(task, known)}"
        )


def _evidence_of(
    strategy: str,
    site: str,
    reduction: float,
    task: str | None,
    documents: Sequence[Comparison],
) -> tuple[Evidence, ...]:
    found = []
    for document in documents:
        runs = [r for r in document.runs if (r.strategy, r.sites) == (strategy, (site,))]
        if not runs:
            continue
        nearest = min(runs, key=lambda run: abs(math.log(_realised(run) / reduction)))
        whole = next(
            run for run in document.runs if run.role == "unreduced" and run.model == nearest.model
        )
        found.append(
            Evidence(
                source=f"{nearest.model}, {document.data.source}",
                reduction=round(_realised(nearest), 2),
                accuracy=_accuracy(nearest, task),
                unreduced=_accuracy(whole, task),
                interval=nearest.accuracy,
            )
        )
    return tuple(found)


def _realised(run: Run) -> float:
    return run.tokens.tokens_in / max(run.tokens.layer_average, 1e-9)


def _accuracy(run: Run, task: str | None) -> float:
    return run.accuracy.value if task is None else run.kinds[task].accuracy
