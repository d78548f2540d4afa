"""Many pipelines on the same questions, with every picture encoded once.

For pipelines at the projector site, what the LLM is given and the signals that strategies read are
captured once; a pipeline then reduces and answers from those, through the same functions as an
attachment. A stage inside the encoder changes what the encoder computes: its pictures are encoded
anew, once each instead of once a question.

This serves answers of one token: the LLM's prefill is all that is computed. What a decoder reads
beside embeddings, a mask and one row of positions is not captured, and refused.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Final

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from tokenreduce.attachment import Attachment, ItemReduction, attach
from tokenreduce.errors import EvaluationError
from tokenreduce.packing import PackedTokens
from tokenreduce.receipt import ItemReceipt, Receipt
from tokenreduce.reducer import Reducer
from tokenreduce.reduction import Reduction
from tokenreduce.stage import ItemOutcome, Stage, run_stages, unchanged_outcomes
from tokenreduce.tokens import VisualTokens
from tokenreduce_integrations.accounting.prices import priced
from tokenreduce_integrations.accounting.timing import Times, clocked
from tokenreduce_integrations.evaluation.answering import (
    Answer,
    encode_batch,
    prepared,
    receipt_of,
    seconds_of,
)
from tokenreduce_integrations.evaluation.data import Sample
from tokenreduce_integrations.transformers.families import find_decoder
from tokenreduce_integrations.transformers.kv_cache import kv_bytes_by_layer
from tokenreduce_integrations.transformers.prompts import PROMPT_SIGNALS
from tokenreduce_integrations.transformers.sequence import (
    ReducedItem,
    gather_outputs,
    gather_positions,
)

#: Sites whose pipelines can be answered from what was captured.
SITES: Final = ("projector", "vision")

#: What a decoder may be given beside the embeddings and still be computed from them alone.
_PLAIN: Final = {"inputs_embeds", "attention_mask", "position_ids", "past_key_values", "use_cache"}


@dataclass(frozen=True)
class _Prompt:
    """One question as the LLM is given it.

    Attributes:
        embeds: ``(S, D)`` without padding.
        item: its visual item; the columns are those of ``embeds``.
        signals: of the item, by name, as its strategies read them.
        encoder_seconds: what encoding it took.
    """

    embeds: Tensor
    item: ItemReduction
    signals: Mapping[str, Tensor]
    encoder_seconds: float


@dataclass(frozen=True)
class _Reduced:
    """What a pipeline made of an item."""

    outcome: ItemOutcome
    seconds: float
    encoder_seconds: float


class Captured:
    """Questions as the LLM is given them, and the signals of their pictures.

    Args:
        model: the model, nothing attached.
        processor: its processor.
        needs: names of the signals to capture.
        joint_encoder: as for :func:`tokenreduce.attach`.
    """

    def __init__(
        self,
        model: nn.Module,
        processor: Any,
        needs: Sequence[str],
        joint_encoder: Any | None = None,
    ) -> None:
        self.model: Any = model
        self.processor = prepared(processor)
        self.needs = tuple(needs)
        self.joint_encoder = joint_encoder
        self.decoder = find_decoder(model)
        self._prompts: dict[str, _Prompt] = {}

    def prompts(self, batch: Sequence[Sample]) -> list[_Prompt]:
        """What the LLM is given for a batch of questions, captured when it is first asked for.

        Raises:
            EvaluationError: if the decoder is given more than can be captured.
        """
        if any(sample.id not in self._prompts for sample in batch):
            self._capture(batch)
        return [self._prompts[sample.id] for sample in batch]

    @torch.no_grad()
    def _capture(self, batch: Sequence[Sample]) -> None:
        log = _Log()
        recorder = _Recorder(names=self.needs, log=log)
        with self.encoding(batch, recorder) as encoded:
            items = encoded.items
        # Pictures are kept once, however many questions are asked about them.
        shared: dict[str, dict[str, Tensor]] = {}
        for row, (sample, item) in enumerate(zip(batch, items, strict=True)):
            signals = {name: signal[0] for name, signal in log.tokens[row].signals.items()}
            own = {name: signals[name] for name in signals if name in PROMPT_SIGNALS}
            rest = shared.setdefault(sample.group, {n: signals[n] for n in signals if n not in own})
            self._prompts[sample.id] = _Prompt(
                embeds=encoded.embeds[row, encoded.valid[row]],
                item=replace(item, columns=item.columns - int((~encoded.valid[row]).sum())),
                signals={**rest, **own},
                encoder_seconds=encoded.seconds,
            )

    @contextmanager
    def encoding(
        self, batch: Sequence[Sample], pipeline: Reducer | Sequence[Stage]
    ) -> Iterator[_Encoded]:
        """Encode a batch with a pipeline attached."""
        inputs = encode_batch(self.processor, batch, self.model.device)
        given: dict[str, Any] = {}

        def keep(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            given.update(kwargs)

        hook = self.decoder.register_forward_pre_hook(keep, with_kwargs=True, prepend=True)
        try:
            with (
                attach(
                    self.model,
                    pipeline,
                    processor=self.processor,
                    joint_encoder=self.joint_encoder,
                ) as run,
                clocked(self.model) as clock,
            ):
                self.model(**inputs)
                _require_plain(self.model, given)
                _require_one_each(batch, run.reductions)
                yield _Encoded(
                    embeds=given["inputs_embeds"],
                    valid=inputs["attention_mask"].bool(),
                    run=run,
                    seconds=clock.towers / len(batch),
                )
        finally:
            hook.remove()


@dataclass(frozen=True)
class _Encoded:
    """A batch that was encoded.

    Attributes:
        embeds: ``(B, S, D)`` what the LLM would be given unreduced.
        valid: ``(B, S)`` False where it is padded.
        run: the attachment.
        seconds: of the encoder, for each question.
    """

    embeds: Tensor
    valid: Tensor
    run: Attachment
    seconds: float

    @property
    def items(self) -> Sequence[ItemReduction]:
        return self.run.reductions


class CachedAnswerer:
    """A pipeline answered from what was captured.

    Args:
        captured: the questions; shared by many pipelines.
        stages: at the sites of :data:`SITES`.
        reduced: whether the stages act.
    """

    def __init__(
        self, captured: Captured, stages: Sequence[Stage], *, reduced: bool = True
    ) -> None:
        if any(stage.limit is not None for stage in stages):
            stages = priced(captured.model, tuple(stages))
        self._captured = captured
        self._stages = tuple(stages)
        self._acts = reduced
        needs = {name for stage in stages for name in stage.reducer.needs}
        self._reads_prompt = bool(PROMPT_SIGNALS & needs)
        self._needs = tuple(needs)
        self._inside = reduced and any(stage.site == "vision" for stage in stages)
        for stage in stages:
            stage.reducer.prepare(captured.model.device, captured.model.dtype)
        self._like = Receipt(
            layers=captured.decoder.config.num_hidden_layers,
            kv_bytes_by_layer=kv_bytes_by_layer(captured.decoder),
        )

    @torch.no_grad()
    def __call__(self, samples: Sequence[Sample]) -> list[Answer]:
        """See :class:`~.answering.Answerer`."""
        prompts = self._captured.prompts(samples)
        chosen = {(sample.id if self._reads_prompt else sample.group): i
                  for i, sample in reversed(list(enumerate(samples)))}  # fmt: skip
        rows = sorted(chosen.values())
        reduce = self._encoded_anew if self._inside else self._reduced
        made = dict(
            zip(rows, reduce([samples[r] for r in rows], [prompts[r] for r in rows]), strict=True)
        )
        mine = [made[chosen[s.id if self._reads_prompt else s.group]] for s in samples]
        started = time.perf_counter()
        texts = self._decoded(prompts, [one.outcome.reduction for one in mine])
        prefill = (time.perf_counter() - started) / len(samples)
        return [
            Answer(
                text=text,
                receipt=receipt_of([_item(prompt, one)], len(prompt.embeds), self._like),
                seconds=seconds_of(
                    Times(
                        encoder=1000 * one.encoder_seconds,
                        selection=1000 * one.seconds,
                        prefill=1000 * prefill,
                        decode=0.0,
                    ),
                    share=1,
                ),
            )
            for prompt, one, text in zip(prompts, mine, texts, strict=True)
        ]

    def _reduced(self, samples: Sequence[Sample], prompts: Sequence[_Prompt]) -> list[_Reduced]:
        """Reduce captured items."""
        layouts = [prompt.item.layout for prompt in prompts]
        if self._acts:
            packed = PackedTokens.from_items(
                [
                    VisualTokens(
                        prompt.embeds[prompt.item.columns][None],
                        prompt.item.layout,
                        signals={name: prompt.signals[name][None] for name in self._needs},
                    )
                    for prompt in prompts
                ]
            )
            started = time.perf_counter()
            outcomes = run_stages(self._stages, packed, range(len(prompts)))
            seconds = (time.perf_counter() - started) / len(prompts)
        else:
            outcomes = unchanged_outcomes(self._stages, layouts, "the attachment is disabled")
            seconds = 0.0
        return [
            _Reduced(outcome, seconds, prompt.encoder_seconds)
            for outcome, prompt in zip(outcomes, prompts, strict=True)
        ]

    def _encoded_anew(
        self, samples: Sequence[Sample], prompts: Sequence[_Prompt]
    ) -> list[_Reduced]:
        """Encode with the stages attached, which reduce inside the encoder."""
        with self._captured.encoding(samples, self._stages) as encoded:
            receipt = encoded.run.receipt
            return [
                _Reduced(
                    ItemOutcome(reduction=item.reduction, stages=record.stages),
                    receipt.selection_ms / 1000 / len(samples),
                    encoded.seconds,
                )
                for item, record in zip(encoded.items, receipt.items, strict=True)
            ]

    def _decoded(
        self, prompts: Sequence[_Prompt], reductions: Sequence[Reduction | None]
    ) -> list[str]:
        """The first token of each answer, as text."""
        model, decoder = self._captured.model, self._captured.decoder
        lengths = torch.tensor([len(prompt.embeds) for prompt in prompts])
        longest = int(lengths.max())
        rows = [prompt.embeds for prompt in prompts]
        if self._inside:
            rows = [_placed(*pair) for pair in zip(prompts, reductions, strict=True)]
        embeds = pad_sequence(rows, batch_first=True, padding_side="left")
        valid = (torch.arange(longest) >= longest - lengths[:, None]).to(embeds.device)
        positions = (valid.long().cumsum(1) - 1).clamp(min=0)
        items = [
            ReducedItem(row, prompt.item.columns + longest - len(prompt.embeds), reduction)
            for row, (prompt, reduction) in enumerate(zip(prompts, reductions, strict=True))
        ]
        if any(reduction is not None for reduction in reductions):
            plan, embeds = gather_outputs(embeds, valid, items)
            positions, valid = gather_positions(positions, plan), plan.valid
        hidden = decoder(
            inputs_embeds=embeds,
            attention_mask=valid.long(),
            position_ids=positions,
            use_cache=False,
        ).last_hidden_state
        chosen = model.get_output_embeddings()(hidden[:, -1:]).argmax(-1)
        decoded = self._captured.processor.batch_decode(chosen, skip_special_tokens=True)
        return [text.strip() for text in decoded]


def _placed(prompt: _Prompt, reduction: Reduction | None) -> Tensor:
    """The embeddings of a prompt with what another encoding gave."""
    if reduction is None:
        return prompt.embeds
    places = prompt.item.columns[reduction.positions[0]]
    return prompt.embeds.index_copy(0, places, reduction.features[0].to(prompt.embeds.dtype))


def _item(prompt: _Prompt, one: _Reduced) -> ItemReceipt:
    return ItemReceipt(prompt=0, modality=prompt.item.modality, stages=one.outcome.stages)


def _require_plain(model: nn.Module, given: Mapping[str, Any]) -> None:
    """Refuse a decoder that reads more than can be captured.

    Raises:
        EvaluationError: naming what it reads.
    """
    embeds: Tensor = given["inputs_embeds"]
    more = [
        name
        for name, value in given.items()
        if name not in _PLAIN and isinstance(value, Tensor) and value.shape[:2] == embeds.shape[:2]
    ]
    for name, most in (("attention_mask", 2), ("position_ids", 2)):
        value = given.get(name)
        if value is not None and not (isinstance(value, Tensor) and value.ndim <= most):
            more.append(name)
    if more:
        raise EvaluationError(
            f"{type(model).__name__} cannot be answered from captured embeddings: its decoder also "
            f"reads {', '.join(more)}. Evaluate it attached."
        )


def _require_one_each(batch: Sequence[Sample], items: Sequence[ItemReduction]) -> None:
    if [item.prompt for item in items] != list(range(len(batch))):
        raise EvaluationError(
            "a question whose picture is several visual items cannot be answered from captured "
            "embeddings. Evaluate it attached."
        )


@dataclass(eq=False)
class _Log:
    """What a recorder was given; hashed by identity, as reducers must be."""

    tokens: list[VisualTokens] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class _Recorder(Reducer):
    """Keeps all, and remembers the tokens with their signals, item by item."""

    names: tuple[str, ...]
    log: _Log

    adaptive: ClassVar[bool] = True

    @property
    def needs(self) -> tuple[str, ...]:
        return self.names

    def __call__(self, tokens: VisualTokens) -> Reduction:
        self.log.tokens.append(tokens)
        return self.reduce(tokens)

    def reduce(self, tokens: VisualTokens) -> Reduction:
        return Reduction.identity(tokens, reason="recorded")
