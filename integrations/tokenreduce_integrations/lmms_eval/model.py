"""The model that lmms-eval runs; it needs the package ``lmms_eval``."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from tqdm import tqdm  # type: ignore[import-untyped]

from tokenreduce.config import load_pipeline
from tokenreduce.errors import PipelineError
from tokenreduce_integrations.lmms_eval.answering import (
    MAX_FRAMES,
    Conversation,
    PipelineModel,
    media_kinds,
    require_engaged,
)


@dataclass
class ReceiptCounts(TokenCounts):  # type: ignore[misc, unused-ignore]
    """Token counts of an answer, with its receipt: lmms-eval logs both beside the sample."""

    receipts: list[Any] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """What is logged: the receipt, or those of all rounds."""
        counts: dict[str, Any] = super().to_dict()
        return {**counts, "receipt": self.receipts[0] if len(self.receipts) == 1 else self.receipts}


class _TokenReduce(lmms):  # type: ignore[misc, unused-ignore]
    """A pipeline as a model of lmms-eval.

    Args:
        pipeline: a pipeline file, a folder that a pipeline was saved to, or a preset.
        batch_size: requests at once.
        device: replaces the pipeline's.
        max_batch_size: not used; lmms-eval states it for every model.
        max_num_frames: frames of a clip that are shown, evenly spaced.
        reduced: False to evaluate the model with all its tokens.
        overrides: values to replace in the pipeline, as in ``reduce.0.reduction=8``.
    """

    def __init__(
        self,
        pipeline: str,
        batch_size: int | str = 1,
        device: str | None = None,
        max_batch_size: int | None = None,
        max_num_frames: int = MAX_FRAMES,
        reduced: bool = True,
        **overrides: Any,
    ) -> None:
        super().__init__()
        unknown = [key for key in overrides if "." not in key]
        if unknown:
            raise PipelineError(
                f"model_args: unknown {', '.join(unknown)}. Known: pipeline, max_num_frames, "
                "reduced, and values of the pipeline by their path, as in reduce.0.reduction=8."
            )
        loaded = load_pipeline(pipeline, [f"{key}={value}" for key, value in overrides.items()])
        if loaded.model is None:
            raise PipelineError(f"{pipeline}: names no model: add 'model: {{path: ...}}'.")
        settings = loaded.model
        if device is not None:
            settings = replace(settings, device=device)
        self.accelerator = Accelerator(cpu=settings.torch_device.type == "cpu")
        if self.accelerator.num_processes > 1 and settings.torch_device.type == "cuda":
            settings = replace(settings, device=str(self.accelerator.device))
        self._rank, self._world_size = (
            self.accelerator.process_index,
            self.accelerator.num_processes,
        )
        self._built = replace(loaded, model=settings).build()
        model, processor, attachment = self._built
        attachment.enabled = self._reduced = bool(reduced)
        self._pipeline = PipelineModel(model, processor, attachment, max_frames=max_num_frames)
        self.batch_size = int(batch_size)

    @property
    def model(self) -> Any:
        """The transformers model."""
        return self._pipeline.model

    @property
    def tokenizer(self) -> Any:
        """Its tokenizer."""
        return self._pipeline.tokenizer

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        device: torch.device = self.model.device
        return device

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """Answer requests in batches of equal options and kinds of media."""
        parts = [self._generation(request) for request in requests]
        conversations = [conversation for conversation, _ in parts]

        def answer(batch: Sequence[int]) -> list[GenerationResult]:
            options = parts[batch[0]][1]
            said = self._pipeline.generate([conversations[i] for i in batch], options)
            return [
                GenerationResult(
                    text=one.text,
                    token_counts=ReceiptCounts(output_tokens=one.tokens, receipts=[one.receipt]),
                )
                for one in said
            ]

        keys = [json.dumps(options, sort_keys=True, default=str) for _, options in parts]
        return self._in_batches(requests, conversations, keys, answer)

    def loglikelihood(self, requests: list[Instance]) -> list[GenerationResult]:
        """Mean loss of each continuation, and whether it is what the model would say.

        The pair stands in a ``GenerationResult``, which lmms-eval unpacks; it would turn a bare
        tuple into text.
        """
        parts = [self._continuation(request) for request in requests]
        conversations = [conversation for conversation, _ in parts]

        def answer(batch: Sequence[int]) -> list[GenerationResult]:
            found = self._pipeline.likelihoods(
                [conversations[i] for i in batch], [parts[i][1] for i in batch]
            )
            return [
                GenerationResult(
                    text=(one.loss, one.greedy), token_counts=ReceiptCounts(receipts=[one.receipt])
                )
                for one in found
            ]

        return self._in_batches(requests, conversations, [""] * len(requests), answer)

    def generate_until_multi_round(self, requests: list[Instance]) -> list[GenerationResult]:
        """Answer requests whose next round depends on the last answer, one by one."""
        results = []
        for request in tqdm(requests, disable=self.rank != 0, desc="tokenreduce, rounds"):
            said: list[str] = []
            receipts: list[Any] = []
            info = None
            while True:
                found = self._round(request, len(said), said, info)
                if found is None:
                    break
                conversation, options, info = found
                [one] = self._pipeline.generate([conversation], options)
                said.append(one.text)
                receipts.append(one.receipt)
            counts = ReceiptCounts(receipts=receipts)
            results.append(GenerationResult(text=said, token_counts=counts))
        self._require_engaged(requests, results)
        return results

    def _in_batches(
        self,
        requests: Sequence[Instance],
        conversations: Sequence[Conversation],
        keys: Sequence[str],
        answer: Callable[[Sequence[int]], list[GenerationResult]],
    ) -> list[GenerationResult]:
        """Answers in the order of the requests."""
        groups: dict[tuple[Any, ...], list[int]] = {}
        for i, (key, conversation) in enumerate(zip(keys, conversations, strict=True)):
            groups.setdefault((key, media_kinds(conversation)), []).append(i)
        results: list[Any] = [None] * len(requests)
        bar = tqdm(total=len(requests), disable=self.rank != 0, desc="tokenreduce")
        for group in groups.values():
            for start in range(0, len(group), self.batch_size):
                batch = group[start : start + self.batch_size]
                for i, result in zip(batch, answer(batch), strict=True):
                    results[i] = result
                bar.update(len(batch))
        bar.close()
        self._require_engaged(requests, results)
        return results

    def _require_engaged(
        self, requests: Sequence[Instance], results: Sequence[GenerationResult]
    ) -> None:
        if not self._reduced:
            return
        receipts: dict[str, list[Any]] = {}
        for request, result in zip(requests, results, strict=True):
            receipts.setdefault(request.task_name, []).extend(result.token_counts.receipts)
        for task, mine in receipts.items():
            require_engaged(task, mine)

    def _doc(self, task: str, split: str, doc_id: Any) -> Any:
        return self.task_dict[task][split][doc_id]

    def _generation(self, request: Instance) -> tuple[Conversation, dict[str, Any]]:
        """What is asked, and the options of generation."""
        raise NotImplementedError

    def _continuation(self, request: Instance) -> tuple[Conversation, str]:
        """What is asked, and the answer whose likelihood is wanted."""
        context, target, to_visual, doc_id, task, split = request.args
        doc = self._doc(task, split, doc_id)
        text = target if isinstance(target, str) else target(doc)
        return user_turn(to_visual(doc), context), str(text)

    def _round(
        self, request: Instance, number: int, said: list[str], info: Any
    ) -> tuple[Conversation, dict[str, Any], Any] | None:
        """What is asked next, the options, and what the task remembers; None at the end."""
        raise NotImplementedError


class TokenReduceChat(_TokenReduce):
    """For tasks that give whole conversations, which lmms-eval makes of most tasks."""

    is_simple = False

    def _generation(self, request: Instance) -> tuple[Conversation, dict[str, Any]]:
        _, to_messages, options, doc_id, task, split = request.args
        return to_messages(self._doc(task, split, doc_id)), options

    def _round(
        self, request: Instance, number: int, said: list[str], info: Any
    ) -> tuple[Conversation, dict[str, Any], Any] | None:
        _, to_messages, options, doc_id, task, split = request.args
        ask = partial(to_messages, self._doc(task, split, doc_id))
        messages, ended, _, info = ask(
            round_idx=number, previous_output=said, previous_round_info=info
        )
        return None if ended else (messages, options, info)


class TokenReduceSimple(_TokenReduce):
    """For ``--force_simple``: tasks give a context and pictures apart; also multiple choice."""

    is_simple = True

    def _generation(self, request: Instance) -> tuple[Conversation, dict[str, Any]]:
        context, options, to_visual, doc_id, task, split = request.args
        return user_turn(to_visual(self._doc(task, split, doc_id)), context), options

    def _round(
        self, request: Instance, number: int, said: list[str], info: Any
    ) -> tuple[Conversation, dict[str, Any], Any] | None:
        context, options, to_visual, to_text, doc_id, task, split = request.args
        doc = self._doc(task, split, doc_id)
        if number == 0:
            return user_turn(to_visual(doc), context), options, info
        visuals, text, ended, _, info = to_text(
            doc, previous_output=said, round_idx=number, previous_round_info=info
        )
        return None if ended else (user_turn(visuals, text), options, info)


def user_turn(visuals: Any, text: str) -> Conversation:
    """One question about pictures or clips, which come first; a path is that of a clip."""
    kinds = ("video" if isinstance(visual, str) else "image" for visual in visuals or ())
    shown = [
        {"type": kind, "url": visual} for kind, visual in zip(kinds, visuals or (), strict=True)
    ]
    return [{"role": "user", "content": [*shown, {"type": "text", "text": text}]}]
