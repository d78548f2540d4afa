"""Conversations put to a model with a pipeline on it, in batches, with a receipt for each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Final

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessor

from tokenreduce.attachment import Attachment
from tokenreduce.errors import MediaError, PipelineError, StageNotEngaged
from tokenreduce_integrations.cli.chat import open_media, open_video_file, templated
from tokenreduce_integrations.evaluation.answering import prepared, receipts_of

#: ``[{"role": ..., "content": [{"type": "text", "text": ...}, {"type": "image", ...}]}, ...]``
Conversation = list[dict[str, Any]]
Receipts = Sequence[Mapping[str, Any]]

MAX_NEW_TOKENS: Final = 128
MAX_FRAMES: Final = 32


@dataclass(frozen=True, kw_only=True)
class Said:
    """What a model said to one conversation.

    Attributes:
        text: the answer.
        tokens: how many tokens it has.
        receipt: what was reduced of this conversation alone, as plain data.
    """

    text: str
    tokens: int
    receipt: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Likelihood:
    """How likely a model finds a continuation.

    Attributes:
        loss: mean negative log-likelihood of its tokens.
        greedy: whether each of its tokens is the most likely one.
        receipt: as for :class:`Said`.
    """

    loss: float
    greedy: bool
    receipt: Mapping[str, Any]


class PipelineModel:
    """A model with a pipeline on it.

    Args:
        model: the model, the pipeline attached.
        processor: its processor, with a chat template.
        attachment: the pipeline on it.
        max_frames: frames of a video file that are shown, evenly spaced.

    Raises:
        PipelineError: if the processor has no chat template.
    """

    def __init__(
        self,
        model: nn.Module,
        processor: Any,
        attachment: Attachment,
        *,
        max_frames: int = MAX_FRAMES,
    ) -> None:
        if getattr(processor, "chat_template", None) is None:
            raise PipelineError(
                f"{type(processor).__name__} has no chat template, so questions cannot be put to "
                "this model. Use a model whose processor has one."
            )
        self.model: Any = model
        self.processor = prepared(processor)
        self.attachment = attachment
        self.max_frames = max_frames

    @property
    def tokenizer(self) -> Any:
        """The processor's tokenizer."""
        return getattr(self.processor, "tokenizer", self.processor)

    @torch.no_grad()
    def generate(
        self, conversations: Sequence[Conversation], options: Mapping[str, Any]
    ) -> list[Said]:
        """Answer conversations, all in one batch.

        Args:
            conversations: with media of the same kinds.
            options: of generation, as tasks state them; see :func:`generation_options`.
        """
        chosen, until = generation_options(options)
        inputs = self._encode(conversations)
        _, new = self._run(inputs, **chosen)
        pad = self.tokenizer.pad_token_id
        texts = self.processor.batch_decode(new, skip_special_tokens=True)
        receipts = self._receipts(inputs)
        return [
            Said(text=cut(text, until), tokens=int((ids != pad).sum()), receipt=receipt)
            for text, ids, receipt in zip(texts, new, receipts, strict=True)
        ]

    @torch.no_grad()
    def likelihoods(
        self, conversations: Sequence[Conversation], continuations: Sequence[str]
    ) -> list[Likelihood]:
        """How likely the continuations are as answers, all in one batch.

        Each answer is forced upon generation token by token, so that what is kept of the picture
        depends on the prompt alone, as when the model answers by itself.

        Args:
            conversations: with media of the same kinds.
            continuations: one for each.

        Raises:
            MediaError: if one is empty.
        """
        answers = [
            self.tokenizer(text.strip(), add_special_tokens=False)["input_ids"]
            for text in continuations
        ]
        if not all(answers):
            raise MediaError("an empty continuation has no likelihood.")
        inputs = self._encode(conversations)
        longest = max(map(len, answers))
        output, _ = self._run(
            inputs,
            do_sample=False,
            num_beams=1,
            max_new_tokens=longest,
            min_new_tokens=longest,
            logits_processor=[_Forced(answers)],
            output_logits=True,
            return_dict_in_generate=True,
        )
        logits = torch.stack(output.logits, dim=1).float().log_softmax(-1)
        found = []
        for row, answer, receipt in zip(logits, answers, self._receipts(inputs), strict=True):
            ids = torch.tensor(answer, device=row.device)
            mine = row[: len(answer)]
            found.append(
                Likelihood(
                    loss=-float(mine.gather(1, ids[:, None]).mean()),
                    greedy=bool((mine.argmax(-1) == ids).all()),
                    receipt=receipt,
                )
            )
        return found

    def _run(self, inputs: Mapping[str, Any], **options: Any) -> tuple[Any, Tensor]:
        """What generation returns, and the new tokens."""
        output = self.model.generate(**inputs, pad_token_id=self.tokenizer.pad_token_id, **options)
        sequences: Tensor = output if isinstance(output, Tensor) else output.sequences
        given = 0 if self.model.config.is_encoder_decoder else inputs["input_ids"].shape[1]
        return output, sequences[:, given:]

    def _receipts(self, inputs: Mapping[str, Any]) -> list[dict[str, Any]]:
        return receipts_of(self.attachment.receipt, inputs["attention_mask"].sum(1).tolist())

    def _encode(self, conversations: Sequence[Conversation]) -> dict[str, Any]:
        shown = [
            [
                {**turn, "content": [self._opened(part) for part in turn["content"]]}
                for turn in conversation
            ]
            for conversation in conversations
        ]
        inputs = templated(self.processor, shown, "these pictures or clips", padding=True)
        return dict(inputs.to(self.model.device))

    def _opened(self, part: Mapping[str, Any]) -> dict[str, Any]:
        """A part of a message, with its picture or clip opened."""
        kind = part["type"]
        if kind == "text":
            return {"type": "text", "text": part["text"]}
        given = part["url"]
        if kind == "image":
            picture = open_media(Path(given)).frames[0] if isinstance(given, str) else given
            if isinstance(picture, Image.Image):
                return {"type": "image", "image": picture.convert("RGB")}
        if kind == "video" and isinstance(given, str):
            span = (part.get("start_time"), part.get("end_time"))
            return {"type": "video", "video": clip_frames(Path(given), self.max_frames, *span)}
        raise MediaError(
            f"{kind} given as {type(given).__name__}: pictures (PIL, or a path) and clips (a path) "
            "can be shown to a pipeline."
        )


class _Forced(LogitsProcessor):
    """Lets generation say nothing but given answers, one for each row, ended by their last token
    again and again."""

    def __init__(self, answers: Sequence[Sequence[int]]) -> None:
        self._answers = answers
        self._step = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        chosen = [answer[min(self._step, len(answer) - 1)] for answer in self._answers]
        self._step += 1
        forced = torch.full_like(scores, -torch.inf)
        forced[torch.arange(len(chosen)), torch.tensor(chosen)] = 0
        return forced


def generation_options(given: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """What ``generate`` is told, and the strings that end an answer.

    Tasks state options of many libraries; those that transformers does not know are left out. At
    temperature 0 the answer is the most likely one.
    """
    until = given.get("until") or []
    known = GenerationConfig()  # type: ignore[no-untyped-call]
    options = {name: value for name, value in given.items() if hasattr(known, name)}
    longest = options.get("max_new_tokens") or given.get("max_gen_toks")
    options["max_new_tokens"] = longest or MAX_NEW_TOKENS
    options["do_sample"] = bool(options.get("do_sample")) and bool(options.get("temperature", 1.0))
    if not options["do_sample"]:
        for name in ("temperature", "top_p", "top_k"):
            options.pop(name, None)
    options["num_beams"] = options.get("num_beams") or 1
    return options, [until] if isinstance(until, str) else list(until)


def cut(text: str, until: Iterable[str]) -> str:
    """The text before the first string that ends an answer."""
    for end in until:
        if end:
            text = text.split(end)[0]
    return text.strip()


def media_kinds(conversation: Conversation) -> tuple[str, ...]:
    """What is shown, in order; conversations of one batch show the same."""
    return tuple(
        part["type"] for turn in conversation for part in turn["content"] if part["type"] != "text"
    )


def clip_frames(
    path: Path, most: int, start: float | None = None, end: float | None = None
) -> list[Image.Image]:
    """Frames of a clip, evenly spaced.

    Args:
        path: a video file, an animation, or a folder of frames.
        most: how many.
        start: seconds to leave out of a video file.
        end: seconds after which it is left.

    Raises:
        MediaError: if it cannot be read.
        MissingExtra: if the package that reads video files is not installed.
    """
    file = open_video_file(path)
    if file is None:
        frames = list(open_media(path).frames)
    else:
        first = start or 0.0
        last = end if end is not None else file.duration
        fps = 1.0 if last is None else most / max(last - first, 1e-3)
        stop = None if last is None else max(round(last * fps), round(first * fps) + 1)
        read = islice(file.frames(fps), round(first * fps), stop)
        frames = [Image.fromarray(frame) for frame in read]
    if not frames:
        raise MediaError(f"{path}: holds no frame between {start} s and {end} s.")
    step = max(1.0, len(frames) / most)
    return [frames[int(i * step)] for i in range(min(most, len(frames)))]


def require_engaged(task: str, receipts: Receipts) -> None:
    """Check that every stage reduced something of a task.

    Raises:
        StageNotEngaged: naming the stage, and why it did nothing.
    """
    stages = [
        (number, stage)
        for receipt in receipts
        for item in receipt["items"]
        for number, stage in enumerate(item["stages"])
    ]
    if not stages:
        raise StageNotEngaged(
            f"task {task!r} shows no picture or clip, so that there is nothing to reduce. Leave it "
            "out, or evaluate the model as it is with reduced=False."
        )
    engaged = {number for number, stage in stages if stage["tokens_out"] < stage["tokens_in"]}
    for number, stage in stages:
        if number not in engaged:
            reasons = {s["reason"] for n, s in stages if n == number and s["reason"]}
            raise StageNotEngaged(
                f"task {task!r}: strategy {stage['strategy']!r} at the site {stage['site']!r} "
                f"reduced none of {len(receipts)} samples "
                f"({'; '.join(sorted(reasons)[:3]) or 'no reason was given'}): this would be a "
                "result of the unreduced model. Give it a smaller budget, or evaluate the model "
                "as it is with reduced=False."
            )
