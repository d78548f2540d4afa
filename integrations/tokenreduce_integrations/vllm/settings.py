"""What a vLLM server reduces: one stage, checked for what vLLM can serve, and told to its workers.

The stage comes from ``hf_overrides["tokenreduce"]``, the same keys as a stage of a pipeline; a
request may change its strategy, budget and options through ``mm_processor_kwargs["tokenreduce"]``.
Nothing here needs vLLM or a model, so both the processor and the worker read it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any, Final

import torch

from tokenreduce import __version__
from tokenreduce.capabilities import STAGE_KEYS
from tokenreduce.config import dump_stage, load_stage
from tokenreduce.errors import ServingError, TokenReduceError, did_you_mean
from tokenreduce.reducer import BUDGET_FIELDS, Reducer
from tokenreduce.stage import Stage
from tokenreduce.tokens import Layout
from tokenreduce_integrations.vllm.counting import kept_tokens, reason_uncountable

#: The key of the settings in ``hf_overrides`` and in ``mm_processor_kwargs``.
KEY: Final = "tokenreduce"
MODALITIES: Final = ("image", "video")
#: Signals that some model served by vLLM gives; which one gives which is up to its family.
SIGNALS: Final = frozenset(
    {
        "vision_features",
        "class_attention",
        "shallow_class_attention",
        "received_attention",
        "queries",
        "keys",
        "prompt_embeddings",
    }
)
#: Signals that are made of the text of a request.
QUERY_SIGNALS: Final = frozenset({"prompt_embeddings"})
#: Most characters of a query: its tokens travel with every item.
LONGEST_QUERY: Final = 4096

_OWN_KEYS = ("modalities", "query")
_SITES = {
    "frames": "vLLM's processor has taken the frames of a clip before anything is known of them",
    "vision": "vLLM has encoders of its own, whose blocks all see the same tokens",
    "decoder": "vLLM plans one sequence length for all layers of the LLM and pages its cache by it",
}
_JOINT = "vLLM loads no text encoder beside the LLM"
_DEEP = "it is taken inside the LLM, which runs after the tokens are reduced"


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """Why vLLM cannot serve a stage.

    Attributes:
        capability: what it asks for, in one or two words.
        reason: why there is no such thing.
    """

    capability: str
    reason: str


def refusals(stage: Stage) -> tuple[Refusal, ...]:
    """Everything about a stage that vLLM cannot serve; empty if it can."""
    return tuple(
        Refusal(capability=capability, reason=reason)
        for capability, reasons in _RULES
        for reason in reasons(stage)
    )


def _site(stage: Stage) -> Iterator[str]:
    if stage.site in _SITES:
        yield _SITES[stage.site]


def _several_items(stage: Stage) -> Iterator[str]:
    if stage.total is not None:
        yield (
            f"total={stage.total} is shared among the items of a prompt, which vLLM counts and "
            "caches one by one"
        )


def _cost(stage: Stage) -> Iterator[str]:
    if stage.limit is not None:
        yield f"what {stage.limit} buys takes the model, which the processor of vLLM has not loaded"


def _steps(stage: Stage) -> Iterator[str]:
    if stage.reducer.from_step:
        yield "vLLM generates token by token, without denoising steps"


def _counts(stage: Stage) -> Iterator[str]:
    if reason := reason_uncountable(stage.reducer):
        yield f"{reason}, and vLLM lays out the prompt before the encoder runs"


def _signals(stage: Stage) -> Iterator[str]:
    for name in stage.reducer.needs:
        if name not in SIGNALS and stage.site not in _SITES:
            yield f"no model of vLLM gives {name!r}: {_JOINT if 'joint' in name else _DEEP}"


_RULES: Sequence[tuple[str, Callable[[Stage], Iterator[str]]]] = (
    ("site", _site),
    ("budget of a prompt", _several_items),
    ("budget of a cost", _cost),
    ("denoising steps", _steps),
    ("count", _counts),
    ("signal", _signals),
)


@dataclass(frozen=True, kw_only=True)
class ServedStage:
    """A stage that vLLM can serve, for one server or one request.

    Attributes:
        stage: at the projector site, with a budget of each item.
        modalities: what is reduced, of ``image`` and ``video``.
        query: the text that a prompt-aware strategy compares with; chat templates and earlier
            turns are no part of it.
        query_ids: the tokens of ``query``; empty until the model's processor tokenized it.
    """

    stage: Stage
    modalities: tuple[str, ...] = MODALITIES
    query: str | None = None
    query_ids: tuple[int, ...] = ()

    @classmethod
    def from_config(cls, settings: object) -> ServedStage:
        """The settings of a server.

        Args:
            settings: a stage of a pipeline as a mapping, and ``modalities`` and ``query``.

        Raises:
            ServingError: if vLLM cannot serve the stage, with every reason.
            TokenReduceError: if the stage is malformed, as for a pipeline.
        """
        where = f"hf_overrides[{KEY!r}]"
        given = _mapping(settings, where)
        modalities = given.pop("modalities", MODALITIES)
        if isinstance(modalities, str) or not isinstance(modalities, Sequence) or not modalities:
            raise ServingError(f"{where}: modalities must list image, video or both.")
        for modality in modalities:
            if modality not in MODALITIES:
                raise ServingError(
                    f"{where}: unknown modality {modality!r}. "
                    f"{did_you_mean(str(modality), MODALITIES)}"
                )
        query = _query(given.pop("query", None), where)
        served = cls(
            stage=_load(json.dumps(_jsonable(given, where), sort_keys=True), where),
            modalities=tuple(name for name in MODALITIES if name in modalities),
            query=query,
        )
        served._refuse_idle_query(where)
        # A missing file of weights is to stop the server, not the first picture.
        served.reducer().prepare(torch.device("cpu"), torch.float32)
        return served

    def for_request(self, overrides: object = None) -> ServedStage:
        """These settings with what a request says.

        A budget replaces the server's, however either is stated. Another strategy comes with its
        own options and keeps the server's budget unless the request gives one.

        Args:
            overrides: any of ``strategy``, ``preset``, a budget, options of the strategy, and
                ``query``; None for a request that says nothing.

        Raises:
            ServingError: if the request is malformed, asks for what vLLM cannot serve or what only
                the server may say, or gives no query to a strategy that compares with one.
        """
        where = f"mm_processor_kwargs[{KEY!r}]"
        if overrides is None:
            return self._require_query()
        given = _mapping(overrides, where)
        for key in given:
            if key == "modalities" or key in STAGE_KEYS:
                raise ServingError(f"{where}: {key} is the server's to say, not a request's.")
        query = _query(given.pop("query", None), where)
        served = self
        if given:
            text = json.dumps(_jsonable(self._with(given), where), sort_keys=True)
            try:
                stage = _load(text, where)
            except ServingError:
                raise
            except TokenReduceError as error:
                raise ServingError(str(error)) from error
            _refuse_files(stage.reducer, given, where)
            served = replace(self, stage=stage)
        if query is not None:
            served = replace(served, query=query, query_ids=())
            served._refuse_idle_query(where)
        elif not served.needs_query:
            served = replace(served, query=None, query_ids=())
        return served._require_query()

    def with_query_ids(self, ids: Sequence[int]) -> ServedStage:
        """The same settings with the tokens of :attr:`query`, for the worker to embed.

        Raises:
            ServingError: if there are none.
        """
        if not len(ids):
            raise ServingError(f"query {self.query!r} has no tokens: give words to compare with.")
        return replace(self, query_ids=tuple(int(token) for token in ids))

    def keep(self, tokens: int | Layout) -> int:
        """How many tokens of an item stay; the same in the processor and in the worker.

        Args:
            tokens: how many unprotected tokens the item has, or where its tokens lie. Strategies
                for which that matters refuse a number.

        Raises:
            ServingError: if an item of this shape cannot be reduced so.
        """
        try:
            return kept_tokens(self.stage.reducer, tokens)
        except ServingError:
            raise
        except TokenReduceError as error:
            raise ServingError(str(error)) from error

    def reducer(self) -> Reducer:
        """The strategy with its budget."""
        return self.stage.reducer

    @property
    def needs(self) -> tuple[str, ...]:
        """Names of the signals that the strategy reads."""
        return self.stage.reducer.needs

    @property
    def uses(self) -> tuple[str, ...]:
        """Names of the signals that it reads as well where there are any."""
        names = (name for each in _parts(self.stage.reducer) for name in each.record.uses)
        return tuple(dict.fromkeys(names))

    @property
    def needs_query(self) -> bool:
        """Whether the strategy compares with a text."""
        return not QUERY_SIGNALS.isdisjoint(self.needs)

    @cached_property
    def digest(self) -> str:
        """Equal for settings that give equal tokens, in every process and on every machine.

        It covers the stage with all that equals no default, the modalities, the query, and the
        versions of TokenReduce and of whoever registered the strategies.
        """
        makers = sorted({each.record.distribution for each in _parts(self.stage.reducer)})
        return hashlib.sha256(
            _text({**self._spec(), "versions": [__version__, *makers]}).encode()
        ).hexdigest()[:16]

    def to_config(self) -> dict[str, Any]:
        """What :meth:`from_config` reads, without what equals its default."""
        stage = {key: value for key, value in dump_stage(self.stage).items() if key != "site"}
        if self.modalities != MODALITIES:
            stage["modalities"] = list(self.modalities)
        return stage if self.query is None else {**stage, "query": self.query}

    def to_json(self) -> str:
        """All that the worker needs to know of an item, as one line of text."""
        return _text({**self._spec(), "query_ids": self.query_ids, "digest": self.digest})

    @classmethod
    def from_json(cls, text: str) -> ServedStage:
        """What :meth:`to_json` wrote.

        Raises:
            ServingError: if it was written by other versions than run here.
        """
        return _from_json(text)

    def _spec(self) -> dict[str, Any]:
        return {
            "stage": dump_stage(self.stage),
            "modalities": self.modalities,
            "query": self.query,
        }

    def _with(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The keys of the stage with those of a request in their place."""
        own = dump_stage(self.stage)
        if ("strategy" in given and given["strategy"] != own["strategy"]) or "preset" in given:
            kept = ("strategy",) if "preset" in given else BUDGET_FIELDS
            own = {key: value for key, value in own.items() if key in kept}
        if any(given.get(key) is not None for key in BUDGET_FIELDS):
            own = {key: value for key, value in own.items() if key not in BUDGET_FIELDS}
        return own | dict(given)

    def _refuse_idle_query(self, where: str) -> None:
        if self.query is not None and not self.needs_query:
            raise ServingError(
                f"{where}: {self.stage.reducer.name} compares with no text, so the query would do "
                "nothing. Leave it out, or choose a prompt-aware strategy such as 'mmtok'."
            )

    def _require_query(self) -> ServedStage:
        if self.needs_query and self.query is None:
            raise ServingError(
                f"{self.stage.reducer.name} compares the picture with a text, and vLLM reduces "
                "pictures apart from the prompt: give the text as mm_processor_kwargs="
                f'{{"{KEY}": {{"query": "..."}}}}.'
            )
        return self


@lru_cache(maxsize=256)
def _load(text: str, where: str) -> Stage:
    """A stage from the JSON text of its keys, checked for what vLLM can serve."""
    stage = load_stage(json.loads(text), where)
    if reasons := refusals(stage):
        listed = "; ".join(f"{refusal.capability}: {refusal.reason}" for refusal in reasons)
        raise ServingError(f"{where}: vLLM cannot serve {stage.reducer.name}: {listed}.")
    return stage


@lru_cache(maxsize=256)
def _from_json(text: str) -> ServedStage:
    data = json.loads(text)
    served = ServedStage(
        stage=_load(_text(data["stage"]), f"hf_overrides[{KEY!r}]"),
        modalities=tuple(data["modalities"]),
        query=data["query"],
        query_ids=tuple(data["query_ids"]),
    )
    if served.digest != data["digest"]:
        raise ServingError(
            "the processor and the worker of vLLM run different versions of TokenReduce or of a "
            f"plugin (here: {__version__}): install the same on all machines."
        )
    return served


def _parts(reducer: Reducer) -> Iterator[Reducer]:
    """A reducer and all that it wraps."""
    yield reducer
    for inner in reducer.inner_reducers():
        yield from _parts(inner)


def _text(data: Mapping[str, Any]) -> str:
    return json.dumps(data, sort_keys=True, separators=(",", ":"))


def _mapping(given: object, where: str) -> dict[str, Any]:
    if not isinstance(given, Mapping) or not all(isinstance(key, str) for key in given):
        raise ServingError(
            f"{where}: must be a mapping like {{'strategy': 'divprune', 'reduction': 8}}, got "
            f"{given!r}."
        )
    return dict(given)


def _jsonable(given: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    try:
        json.dumps(given, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ServingError(f"{where}: must be made of what JSON can hold ({error}).") from error
    return given


def _query(query: object, where: str) -> str | None:
    if query is None:
        return None
    if not isinstance(query, str) or not query.strip():
        raise ServingError(f"{where}: query must be a text to compare with, got {query!r}.")
    if len(query) > LONGEST_QUERY:
        raise ServingError(
            f"{where}: a query of {len(query)} characters is too long: at most {LONGEST_QUERY}."
        )
    return query


def _refuse_files(reducer: Reducer, given: Mapping[str, Any], where: str) -> None:
    """A request may not make the server read a file of its choice."""
    reads = [each.name for each in _parts(reducer) if each.record.needs_weights]
    if reads and any(key not in BUDGET_FIELDS for key in given):
        raise ServingError(
            f"{where}: {reads[0]} reads a file of the server, so only the server may choose it: "
            f"put it into hf_overrides[{KEY!r}]."
        )
