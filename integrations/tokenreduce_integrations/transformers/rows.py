"""What a layer of the LLM tells of visual tokens: rows of its attention, its keys, its text.

Attention rows are recomputed from the queries and keys of the one layer before a cut, and only for
the text that asks, so the LLM keeps its fast attention kernel.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tokenreduce.errors import MissingSignal
from tokenreduce.ops.page_rank import attention_page_rank
from tokenreduce_integrations.transformers.hooks import require_in_place
from tokenreduce_integrations.transformers.observed_attention import observe

_OBSERVED = frozenset(
    {
        "last_token_attention",
        "prompt_attention",
        "decoder_received_attention",
        "attention_page_rank",
        "decoder_keys",
        "prompt_keys",
    }
)
#: Rows of attention that are held at once.
_ROWS = 512
#: Signals that a stage at the decoder site may read.
DECODER_SIGNALS = _OBSERVED | {"prompt_states", "unrotated_attention"}


class Placed(Protocol):
    """A visual item in a sequence: its row and its columns ``(N,)``."""

    @property
    def prompt(self) -> int: ...

    @property
    def columns(self) -> Tensor: ...


@dataclass(frozen=True)
class Observed:
    """One call of an attention layer.

    Attributes:
        query: ``(B, H, S, D)``.
        key: ``(B, H', L + S, D)``, those of L cached slots first.
        mask: None (causal), ``(B or 1, 1 or H, S, L + S)``, or ``(B, L + S)``.
        scaling: of the logits.
        softcap: of the logits, or None.
    """

    query: Tensor
    key: Tensor
    mask: Tensor | None
    scaling: float
    softcap: float | None = None

    def rows(self, prompt: int, columns: Tensor) -> Tensor:
        """``(R, S)`` float32: mean attention over heads from some columns to all of the sequence.

        Args:
            prompt: the row of the batch.
            columns: ``(R,)`` columns of the sequence that ask.
        """
        attention = self.logits(prompt, columns).softmax(-1)
        return attention.mean(0)[:, -self.query.shape[2] :]

    def logits(self, prompt: int, columns: Tensor) -> Tensor:
        """``(H, R, L + S)`` float32, masked, from some columns to cached slots and the sequence."""
        query = self.query[prompt, :, columns].float()
        key = self.key[prompt].float()
        groups = query.shape[0] // key.shape[0]
        logits = query.unflatten(0, (-1, groups)) @ key[:, None].transpose(2, 3) * self.scaling
        logits = logits.flatten(0, 1)
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return self._masked(logits, prompt, columns)

    def _masked(self, logits: Tensor, prompt: int, columns: Tensor) -> Tensor:
        shut = torch.finfo(logits.dtype).min
        if self.mask is None or self.mask.ndim == 2:
            held = logits.shape[-1]
            place = held - self.query.shape[2] + columns
            seen = torch.arange(held, device=logits.device) <= place[:, None]
            if self.mask is not None:
                seen = seen & self.mask[prompt].bool()
            return logits.masked_fill(~seen, shut)
        mask = self.mask[prompt if self.mask.shape[0] > 1 else 0][:, columns]
        if mask.dtype == torch.bool:
            return logits.masked_fill(~mask, shut)
        return logits + mask.float()


class _Caught(threading.local):
    """What was seen of the call under way; threads may share a model."""

    def __init__(self) -> None:
        self.observed: Observed | None = None
        self.projected: dict[str, Tensor] = {}


class RowProbe:
    """Hooks on the layer before a cut, and the signals that it gives.

    Args:
        layer: the decoder layer.
        needs: names of the signals that the stages after it read.
        wanted: whether the call under way is one whose tokens will be cut.

    Raises:
        MissingSignal: if the layer cannot give one of them.
    """

    def __init__(
        self, layer: nn.Module, needs: Collection[str], wanted: Callable[[], bool]
    ) -> None:
        self._needs = frozenset(needs) & DECODER_SIGNALS
        self._wanted = wanted
        self._caught = _Caught()
        self._handles: list[Any] = []
        attention: Any = getattr(layer, "self_attn", None)
        if self._needs - {"prompt_states"} and attention is None:
            raise MissingSignal(
                f"{type(layer).__name__} has no self_attn whose attention could be read."
            )
        if self._needs & _OBSERVED:
            self._handles.append(observe(attention, self._see))
        if "unrotated_attention" in self._needs:
            self._heads = attention.head_dim
            self._scaling = attention.scaling
            for part in ("q", "k"):
                self._handles.append(self._watch_projection(attention, part))

    def detach(self) -> None:
        """Remove the hooks; detaching twice does nothing."""
        handles, self._handles = self._handles, []
        for handle in handles:
            handle.remove()

    def signals(
        self, hidden: Tensor, valid: Tensor, items: Sequence[Placed]
    ) -> dict[str, Tensor | list[Tensor]]:
        """The signals of some items.

        Args:
            hidden: ``(B, S, D)`` hidden states at the cut.
            valid: ``(B, S)`` False where the sequence is padded.
            items: the items.
        """
        asking = Asking(hidden, valid, items)
        read: Mapping[str, Callable[[Asking], Tensor | list[Tensor]]] = {
            "last_token_attention": lambda a: _last_rows(self._observed(), a),
            "prompt_attention": self._prompt_attention,
            "decoder_received_attention": lambda a: self._of_prompts(_mean_received, a),
            "attention_page_rank": lambda a: self._of_prompts(_page_rank, a),
            "decoder_keys": self._keys,
            "prompt_keys": self._prompt_keys,
            "prompt_states": lambda a: [a.hidden[i.prompt, t] for i, t in a.pairs],
            "unrotated_attention": self._unrotated_attention,
        }
        found = {name: read[name](asking) for name in self._needs}
        self.forget()
        return found

    def forget(self) -> None:
        """Let go of what was seen."""
        self._caught.observed, self._caught.projected = None, {}

    def _see(
        self,
        _: nn.Module,
        query: Tensor,
        key: Tensor,
        mask: Tensor | None,
        kwargs: Mapping[str, Any],
    ) -> None:
        if self._wanted():
            scaling = kwargs.get("scaling")
            self._caught.observed = Observed(
                query.detach(),
                key.detach(),
                mask,
                query.shape[-1] ** -0.5 if scaling is None else scaling,
                kwargs.get("softcap"),
            )

    def _watch_projection(self, attention: Any, part: str) -> RemovableHandle:
        """Catch queries or keys before rotary positions; after their norm, where they have one."""
        names = (f"{part}_norm", f"{part}_proj")
        name = next((n for n in names if hasattr(attention, n)), None)
        if name is None:
            raise MissingSignal(
                f"{type(attention).__name__} has no {part}_proj: attention without rotary "
                "positions cannot be read from fused projections."
            )

        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            if self._wanted():
                require_in_place(attention, name, module)
                self._caught.projected[part] = output.detach()

        handle: RemovableHandle = getattr(attention, name).register_forward_hook(hook)
        return handle

    def _observed(self) -> Observed:
        if self._caught.observed is None:
            raise MissingSignal(
                "the attention of the layer before the cut was not seen: it ran compiled, or its "
                "kernel was replaced after attaching."
            )
        return self._caught.observed

    def _prompt_attention(self, asking: Asking) -> list[Tensor]:
        observed = self._observed()
        return [observed.rows(i.prompt, text)[:, i.columns].T for i, text in asking.pairs]

    def _of_prompts(
        self, measure: Callable[[Observed, int, Tensor], Tensor], asking: Asking
    ) -> Tensor:
        """What is measured once for each prompt, of every column, at the items' columns."""
        observed = self._observed()
        measured = {
            prompt: measure(observed, prompt, asking.valid[prompt])
            for prompt in dict.fromkeys(item.prompt for item in asking.items)
        }
        return torch.cat([measured[item.prompt][item.columns] for item in asking.items])

    def _keys(self, asking: Asking) -> Tensor:
        return torch.cat([self._keys_at(i.prompt, i.columns, asking) for i in asking.items])

    def _prompt_keys(self, asking: Asking) -> list[Tensor]:
        return [self._keys_at(item.prompt, text, asking) for item, text in asking.pairs]

    def _keys_at(self, prompt: int, columns: Tensor, asking: Asking) -> Tensor:
        key = self._observed().key[prompt]
        held = key.shape[1] - asking.hidden.shape[1]
        return key[:, held + columns].transpose(0, 1).flatten(1)

    def _unrotated_attention(self, asking: Asking) -> Tensor:
        query, key = (
            states.view(*asking.hidden.shape[:2], -1, self._heads).transpose(1, 2)
            for states in (self._caught.projected[part] for part in ("q", "k"))
        )
        return _last_rows(Observed(query, key, asking.valid, self._scaling), asking)


class ItemText(NamedTuple):
    """A visual item and the columns ``(R,)`` of the text that follows it."""

    item: Placed
    text: Tensor


@dataclass(frozen=True)
class Asking:
    """The text that asks about visual items: what follows them, since it alone attends to them."""

    hidden: Tensor
    valid: Tensor
    items: Sequence[Placed]

    @cached_property
    def pairs(self) -> list[ItemText]:
        """Each item with the text after it; the prompt's last token if nothing follows."""
        text = self.valid.clone()
        for item in self.items:
            text[item.prompt, item.columns] = False
        pairs = []
        for item in self.items:
            columns = text[item.prompt].nonzero().squeeze(1)
            if len(item.columns):
                columns = columns[columns > item.columns[-1]]
            pairs.append(ItemText(item, columns if len(columns) else self.last(item)[None]))
        return pairs

    def last(self, item: Placed) -> Tensor:
        """The column of the prompt's last token."""
        return self.valid[item.prompt].nonzero()[-1, 0]


def _last_rows(observed: Observed, asking: Asking) -> Tensor:
    """Attention of each prompt's last token to its items, end to end."""
    return torch.cat(
        [observed.rows(i.prompt, asking.last(i)[None])[0, i.columns] for i in asking.items]
    )


def _page_rank(observed: Observed, prompt: int, valid: Tensor) -> Tensor:
    """``(S,)`` how often walks along the attention of the sequence come by each column."""
    columns = valid.nonzero().squeeze(1)
    held = observed.key.shape[2] - observed.query.shape[2]
    logits = observed.logits(prompt, columns)[:, :, held + columns]
    rank = torch.zeros(valid.shape[0], device=valid.device)
    return rank.index_copy(0, columns, attention_page_rank(logits[None])[0])


def _mean_received(observed: Observed, prompt: int, valid: Tensor) -> Tensor:
    """``(S,)`` mean attention over all valid columns that each column receives, in chunks."""
    columns = valid.nonzero().squeeze(1)
    total = torch.zeros(valid.shape[0], device=valid.device)
    for part in columns.split(_ROWS):
        total += observed.rows(prompt, part).sum(0)
    return total / len(columns)
