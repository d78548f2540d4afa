"""Answers of a model with a pipeline on it, one batch of questions at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from tokenreduce.attachment import Attachment
from tokenreduce.errors import MediaError, PipelineError
from tokenreduce.receipt import ItemReceipt, Receipt
from tokenreduce_integrations.accounting.timing import Times, clocked
from tokenreduce_integrations.cli.chat import Media, templated
from tokenreduce_integrations.evaluation.data import Sample
from tokenreduce_integrations.evaluation.schema import PARTS


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a model said to one question.

    Attributes:
        text: the prediction.
        receipt: of this question alone, as plain data.
        seconds: by :data:`~.schema.PARTS`.
    """

    text: str
    receipt: Mapping[str, Any]
    seconds: Mapping[str, float]


class Answerer(Protocol):
    """A model with a pipeline, ready to answer."""

    def __call__(self, samples: Sequence[Sample]) -> list[Answer]:
        """Answer one batch; equal batches are answered alike."""
        ...


class AttachedAnswerer:
    """The model as a user runs it: ``generate`` with the pipeline attached.

    Args:
        model: the model, the pipeline attached.
        processor: its processor.
        attachment: the pipeline on it.
        max_new_tokens: longest answer.
    """

    def __init__(
        self, model: nn.Module, processor: Any, attachment: Attachment, *, max_new_tokens: int
    ) -> None:
        self._model: Any = model
        self._processor = prepared(processor)
        self._attachment = attachment
        self._max_new_tokens = max_new_tokens

    @torch.no_grad()
    def __call__(self, samples: Sequence[Sample]) -> list[Answer]:
        """See :class:`Answerer`."""
        answers: list[Answer] = []
        for _, same in groupby(samples, key=lambda sample: sample.modality):
            answers += self._answer(list(same))
        return answers

    def _answer(self, samples: Sequence[Sample]) -> list[Answer]:
        inputs = encode_batch(self._processor, samples, self._model.device)
        with clocked(self._model) as clock:
            output: Tensor = self._model.generate(
                **inputs, max_new_tokens=self._max_new_tokens, do_sample=False
            )
            clock.stop()
        given = 0 if self._model.config.is_encoder_decoder else inputs["input_ids"].shape[1]
        texts = self._processor.batch_decode(output[:, given:], skip_special_tokens=True)
        receipt = self._attachment.receipt
        times = clock.answer(receipt.selection_ms)
        receipts = receipts_of(receipt, inputs["attention_mask"].sum(1).tolist())
        return [
            Answer(text=text.strip(), receipt=mine, seconds=seconds_of(times, len(samples)))
            for text, mine in zip(texts, receipts, strict=True)
        ]


def prepared(processor: Any) -> Any:
    """A processor that pads prompts on the left, as generation needs."""
    tokenizer = getattr(processor, "tokenizer", processor)
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return processor


def encode_batch(processor: Any, samples: Sequence[Sample], device: torch.device) -> dict[str, Any]:
    """The model's inputs for questions of one modality, through the processor's chat template.

    Raises:
        PipelineError: if the processor has no chat template.
        MediaError: if the processor cannot take this kind of media.
    """
    if getattr(processor, "chat_template", None) is None:
        raise PipelineError(
            f"{type(processor).__name__} has no chat template, so questions cannot be put to this "
            "model. Use a model whose processor has one."
        )
    if samples[0].modality == "video" and getattr(processor, "video_processor", None) is None:
        raise MediaError(f"this model takes no clips ({type(processor).__name__}).")
    conversations = [_conversation(sample.read(), sample.question) for sample in samples]
    what = f"the questions {samples[0].id} to {samples[-1].id}"
    inputs = templated(processor, conversations, what, padding=True)
    return dict(inputs.to(device))


def receipts_of(receipt: Receipt, lengths: Sequence[int]) -> list[dict[str, Any]]:
    """The receipt of each prompt of a batch, as if it had been alone.

    Args:
        receipt: of the batch.
        lengths: tokens of each prompt, without padding.
    """
    return [
        receipt_of([item for item in receipt.items if item.prompt == prompt], length, receipt)
        for prompt, length in enumerate(lengths)
    ]


def receipt_of(items: Sequence[ItemReceipt], length: int, like: Receipt) -> dict[str, Any]:
    """The receipt of one prompt as plain data.

    Args:
        items: its visual items.
        length: its tokens before any reduction.
        like: a receipt of the same model.
    """
    gone = sum(item.tokens_in - item.tokens_after(0) for item in items)
    reasons = dict.fromkeys(stage.reason for item in items for stage in item.stages)
    reduced = any(s.tokens_out < s.tokens_in for item in items for s in item.stages)
    document = Receipt(
        items=tuple(replace(item, prompt=0) for item in items),
        sequence_in=length,
        sequence_out=length - gone,
        layers=like.layers,
        kv_bytes_by_layer=like.kv_bytes_by_layer,
        reason="" if reduced else "; ".join(filter(None, reasons)),
        steps=tuple(replace(steps, tokens=_read_in(items, steps.first)) for steps in like.steps),
    ).as_dict()
    del document["selection_ms"]
    return document


def _read_in(items: Sequence[ItemReceipt], step: int) -> int:
    """Visual tokens that a denoising step reads."""
    return sum(
        [item.tokens_in, *(s.tokens_out for s in item.stages if s.from_step <= step)][-1]
        for item in items
    )


def seconds_of(times: Times, share: int) -> dict[str, float]:
    """Seconds of one of ``share`` questions that were answered at once."""
    return {part: round(getattr(times, part) / 1000 / share, 6) for part in PARTS}


def _conversation(media: Media, question: str) -> list[dict[str, Any]]:
    shown = media.frames[0] if media.modality == "image" else list(media.frames)
    content = [
        {"type": media.modality, media.modality: shown},
        {"type": "text", "text": question},
    ]
    return [{"role": "user", "content": content}]
