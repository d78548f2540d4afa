"""How long the parts of a model take, on what really ran."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import nn

from tokenreduce.attachment import Attachment
from tokenreduce_integrations.accounting.parts import ENCODER, PROJECTOR, modules_by_part
from tokenreduce_integrations.transformers.families import find_decoder


@dataclass(frozen=True, kw_only=True)
class Times:
    """Milliseconds of one answer.

    Attributes:
        encoder: encoder and projector.
        selection: choosing and merging tokens.
        prefill: the LLM on the prompt, without the selection.
        decode: each further token, by itself.
    """

    encoder: float
    selection: float
    prefill: float
    decode: float

    @property
    def first_token(self) -> float:
        """Encoder, selection and prefill together."""
        return self.encoder + self.selection + self.prefill

    def as_dict(self) -> dict[str, float]:
        """The times as plain data."""
        return {**asdict(self), "first_token": self.first_token}


def median_times(runs: Sequence[Times]) -> Times:
    """The median of each figure by itself."""
    names = ("encoder", "selection", "prefill", "decode")
    return Times(**{name: statistics.median(getattr(run, name) for run in runs) for name in names})


@torch.no_grad()
def time_answer(
    model: nn.Module, inputs: Mapping[str, Any], new_tokens: int, run: Attachment | None = None
) -> Times:
    """Time one greedy answer of exactly ``new_tokens`` tokens.

    The device is waited for at the ends of the encoder and of every call of the LLM. The logits
    between two calls count for the call before.

    Args:
        model: the model.
        inputs: of one prompt or a batch of them.
        new_tokens: at least 2.
        run: what is attached to the model, whose selection is told apart.
    """
    generate: Any = model.generate
    with clocked(model) as clock:
        generate(
            **inputs,
            do_sample=False,
            num_beams=1,
            min_new_tokens=new_tokens,
            max_new_tokens=new_tokens,
        )
        clock.stop()
    whole = clock.answer(0.0 if run is None else run.receipt.selection_ms)
    return replace(whole, decode=whole.decode / (new_tokens - 1))


@contextmanager
def clocked(model: nn.Module) -> Iterator[Clock]:
    """Time the parts of one call of ``generate`` in the context; ``stop`` the clock after it."""
    clock = Clock(next(model.parameters()).device)
    decoder = find_decoder(model)
    towers = [m for m, (part, _) in modules_by_part(model).items() if part in (ENCODER, PROJECTOR)]
    handles = [
        decoder.register_forward_pre_hook(clock.decoder_begins, prepend=True),
        decoder.register_forward_hook(clock.decoder_ends),
    ]
    for module in towers:
        handles.append(module.register_forward_pre_hook(clock.tower_begins, prepend=True))
        handles.append(module.register_forward_hook(clock.tower_ends))
    try:
        yield clock
    finally:
        for handle in handles:
            handle.remove()


class Clock:
    """When the parts began and ended, in seconds."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._depth = 0
        self._began = 0.0
        self._stopped = 0.0
        self.towers = 0.0
        self.calls: list[tuple[float, float]] = []

    def stop(self) -> None:
        """The answer is complete."""
        self._stopped = self.now()

    def answer(self, selection: float) -> Times:
        """Milliseconds of the parts; ``decode`` of all tokens after the first.

        Args:
            selection: milliseconds of the first call of the LLM that chose and merged tokens.
        """
        begins, ends = self.calls[0]
        return Times(
            encoder=self.towers * 1000,
            selection=selection,
            prefill=max(0.0, (ends - begins) * 1000 - selection),
            decode=(self._stopped - ends) * 1000,
        )

    def now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    def tower_begins(self, *_: Any) -> None:
        # Some projectors lie inside the encoder: the outermost module counts.
        if self._depth == 0:
            self._began = self.now()
        self._depth += 1

    def tower_ends(self, *_: Any) -> None:
        self._depth -= 1
        if self._depth == 0:
            self.towers += self.now() - self._began

    def decoder_begins(self, *_: Any) -> None:
        self._began = self.now()

    def decoder_ends(self, *_: Any) -> None:
        self.calls.append((self._began, self.now()))
