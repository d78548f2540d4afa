"""What really happened: tokens in and out, time, memory, and a reason wherever nothing was done."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from tokenreduce.capabilities import Site
from tokenreduce.errors import PluginError
from tokenreduce.plugins import installed, strict


@dataclass(frozen=True, kw_only=True)
class Spending:
    """What the LLM spends on an item that was cut to meet a cost.

    Attributes:
        unit: ``"flops"`` or ``"prefill_ms"``.
        limit: what the budget allows.
        spent: what the kept tokens cost, by the same account.
    """

    unit: str
    limit: float
    spent: float

    def __str__(self) -> str:
        return f"{self.unit} {self.spent:.4g} of {self.limit:.4g}"


@dataclass(frozen=True, kw_only=True)
class StageReceipt:
    """What one stage did to one visual item.

    Attributes:
        strategy: name of the strategy.
        site: where it ran.
        tokens_in: tokens before the stage, protected ones included.
        tokens_out: tokens after it, protected ones included.
        protected: tokens that stood outside the budget.
        layer: after how many layers of the LLM, or blocks of the encoder, it ran; None elsewhere.
        from_step: denoising steps of a diffusion model that see the tokens before the stage; those
            that follow see what it left.
        reason: why nothing was reduced, or an empty string.
        spending: what the kept tokens cost, where the budget states a cost.
    """

    strategy: str
    site: Site
    tokens_in: int
    tokens_out: int
    protected: int = 0
    layer: int | None = None
    from_step: int = 0
    reason: str = ""
    spending: Spending | None = None


@dataclass(frozen=True, kw_only=True)
class ItemReceipt:
    """What became of one visual item.

    Attributes:
        prompt: index of the prompt in the batch.
        modality: ``"image"`` or ``"video"``.
        stages: one entry for each stage, in order.
    """

    prompt: int
    modality: str
    stages: tuple[StageReceipt, ...]

    @property
    def tokens_in(self) -> int:
        """Tokens that the encoder and projector gave."""
        return self.stages[0].tokens_in

    @property
    def tokens_out(self) -> int:
        """Tokens that the last stage leaves."""
        return self.stages[-1].tokens_out

    def tokens_after(self, layers: int) -> int:
        """Tokens that enter the layer after the first ``layers`` ones of the LLM."""
        count = self.tokens_in
        for stage in self.stages:
            if stage.site != "decoder" or (stage.layer or 0) <= layers:
                count = stage.tokens_out
        return count


@dataclass(frozen=True, kw_only=True)
class StepRange:
    """Denoising steps of a diffusion model that read the same visual tokens.

    Attributes:
        first: the first of them; each block of the answer counts from 0.
        passes: how many have run since the prefill, over all blocks of the answer.
        tokens: visual tokens that each of them reads, over the batch.
    """

    first: int
    passes: int
    tokens: int

    def __str__(self) -> str:
        return f"from denoising step {self.first} on {self.tokens} ({self.passes} passes)"


class Stopwatch:
    """Measures stretches of work on a device without waiting for it.

    On CUDA it records events and reads them only when the time is asked for.
    """

    def __init__(self) -> None:
        self._seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def running(self, device: torch.device) -> Iterator[None]:
        """Count the time of the enclosed work."""
        if device.type == "cuda":
            start = torch.cuda.Event(enable_timing=True)
            stop = torch.cuda.Event(enable_timing=True)
            start.record(torch.cuda.current_stream(device))
            try:
                yield
            finally:
                stop.record(torch.cuda.current_stream(device))
                self._events.append((start, stop))
            return
        started = time.perf_counter()
        try:
            yield
        finally:
            self._seconds += time.perf_counter() - started

    @property
    def milliseconds(self) -> float:
        """Time counted so far; on CUDA this waits for the work to end."""
        for start, stop in self._events:
            stop.synchronize()
            self._seconds += start.elapsed_time(stop) / 1000
        self._events.clear()
        return self._seconds * 1000


@dataclass(frozen=True, kw_only=True)
class Receipt:
    """The record of one prefill.

    Attributes:
        items: one entry for each visual item, in the order of the prompts.
        sequence_in: length of the padded sequence that the model was given.
        sequence_out: length of the padded sequence that the first LLM layer computed.
        layers: number of LLM layers; 0 for an encoder alone.
        kv_bytes_by_layer: bytes of keys and values of one token in each layer; None if unknown.
        stopwatch: time spent choosing and merging tokens.
        reason: why nothing was reduced at all, or an empty string.
        steps: what denoising steps read, where that changes from one step to the next. Passes are
            counted up to the moment at which the receipt is read.
    """

    items: tuple[ItemReceipt, ...] = ()
    sequence_in: int = 0
    sequence_out: int = 0
    layers: int = 0
    kv_bytes_by_layer: tuple[int, ...] | None = ()
    stopwatch: Stopwatch = field(default_factory=Stopwatch, repr=False, compare=False)
    reason: str = ""
    steps: tuple[StepRange, ...] = ()

    @property
    def tokens_in(self) -> int:
        """Visual tokens that the encoder and projector gave."""
        return sum(item.tokens_in for item in self.items)

    @property
    def tokens_out(self) -> int:
        """Visual tokens that the last stage leaves."""
        return sum(item.tokens_out for item in self.items)

    @property
    def ratio(self) -> float:
        """Realised share of the visual tokens, out over in; 1.0 without visual tokens."""
        return self.tokens_out / self.tokens_in if self.tokens_in else 1.0

    @property
    def tokens_per_layer(self) -> tuple[int, ...]:
        """Visual tokens in each LLM layer, over the batch."""
        return tuple(
            sum(item.tokens_after(layer) for item in self.items) for layer in range(self.layers)
        )

    @property
    def kv_bytes_per_token(self) -> int | None:
        """Bytes of keys and values of one token over all layers; None if unknown."""
        return None if self.kv_bytes_by_layer is None else sum(self.kv_bytes_by_layer)

    @property
    def kv_bytes(self) -> int | None:
        """Bytes of the visual tokens' keys and values; None if unknown.

        Where denoising steps read all tokens first, both sequences are held.
        """
        if self.kv_bytes_by_layer is None:
            return None
        layers = zip(self.tokens_per_layer, self.kv_bytes_by_layer, strict=True)
        full = self.tokens_in * sum(self.kv_bytes_by_layer) if self.steps else 0
        return sum(tokens * size for tokens, size in layers) + full

    @property
    def kv_bytes_saved(self) -> int | None:
        """Bytes of keys and values that the dropped tokens would have taken; None if unknown.

        Less than 0 where two sequences are held.
        """
        if self.kv_bytes is None or self.kv_bytes_per_token is None:
            return None
        return self.tokens_in * self.kv_bytes_per_token - self.kv_bytes

    @property
    def selection_ms(self) -> float:
        """Milliseconds spent choosing and merging tokens."""
        return self.stopwatch.milliseconds

    def as_dict(self) -> dict[str, Any]:
        """The receipt as plain data, for JSON."""
        return {
            "tokens_in": self.tokens_in,
            "tokens_out": self.tokens_out,
            "ratio": self.ratio,
            "sequence_in": self.sequence_in,
            "sequence_out": self.sequence_out,
            "tokens_per_layer": list(self.tokens_per_layer),
            "kv_bytes": self.kv_bytes,
            "kv_bytes_saved": self.kv_bytes_saved,
            "selection_ms": self.selection_ms,
            "reason": self.reason,
            **({"steps": [asdict(steps) for steps in self.steps]} if self.steps else {}),
            "items": [
                {
                    "prompt": item.prompt,
                    "modality": item.modality,
                    "tokens_in": item.tokens_in,
                    "tokens_out": item.tokens_out,
                    "stages": [
                        {
                            "strategy": stage.strategy,
                            "site": stage.site,
                            "tokens_in": stage.tokens_in,
                            "tokens_out": stage.tokens_out,
                            "protected": stage.protected,
                            "layer": stage.layer,
                            **({"from_step": stage.from_step} if stage.from_step else {}),
                            "reason": stage.reason,
                            **({"spending": asdict(stage.spending)} if stage.spending else {}),
                        }
                        for stage in item.stages
                    ],
                }
                for item in self.items
            ],
        }

    def __str__(self) -> str:
        if not self.items:
            return f"nothing reduced: {self.reason}"
        lines = []
        for item in self.items:
            steps = [f"prompt {item.prompt}, {item.modality}: {item.tokens_in}"]
            for stage in item.stages:
                guarded = f", {stage.protected} protected" if stage.protected else ""
                why = f", {stage.reason}" if stage.reason else ""
                why += f", {stage.spending}" if stage.spending else ""
                place = stage.site if stage.layer is None else f"{stage.site} layer {stage.layer}"
                place += f" from step {stage.from_step}" if stage.from_step else ""
                steps.append(f"{stage.tokens_out} ({stage.strategy} at {place}{guarded}{why})")
            lines.append(" -> ".join(steps))
        if self.steps:
            lines.append(f"visual tokens read: {', '.join(map(str, self.steps))}")
        fewer = "all withdrawn"
        if self.tokens_out:
            fewer = f"{self.tokens_in / self.tokens_out:.1f}x fewer"
        last = [f"{self.tokens_in} -> {self.tokens_out} visual tokens ({fewer})"]
        if self.layers:
            last.append(f"LLM sequence {self.sequence_in} -> {self.sequence_out}")
        last.append(f"selection {self.selection_ms:.1f} ms")
        if self.layers and self.kv_bytes_saved is not None:
            saved = self.kv_bytes_saved / 2**20
            last.append(f"KV cache {abs(saved):.1f} MiB {'larger' if saved < 0 else 'smaller'}")
        lines.append(", ".join(last))
        return "\n".join(lines)


def notify_observers(receipt: Receipt) -> None:
    """Hand a receipt to every registered observer; one that fails is warned of, no more."""
    observers = installed().observers
    for name in observers:
        try:
            observers.resolve(name)(receipt)
        except Exception as error:
            if strict():
                raise PluginError(f"observer {name!r} failed: {error!r}") from error
            warnings.warn(f"observer {name!r} failed: {error!r}", RuntimeWarning, stacklevel=2)
