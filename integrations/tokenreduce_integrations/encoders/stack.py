"""The blocks of an encoder, wrapped on their instances."""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Generic, Protocol, TypeVar

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tokenreduce.errors import AttachmentError, MissingSignal, UnsupportedModel
from tokenreduce.stage import Stage
from tokenreduce_integrations.encoders.dense import DenseWalk
from tokenreduce_integrations.encoders.kinds import BlockCall, BlockKind, find_blocks, takes_bias
from tokenreduce_integrations.transformers.hooks import (
    Replacement,
    Uncopyable,
    outside_compilation,
    replace_method,
    restore_methods,
)


class Around(Uncopyable):
    """Stands in for a method, which it calls by way of a function.

    Args:
        original: the method.
        around: called with the method, its positional and its named arguments.
    """

    def __init__(self, original: Callable[..., Any], around: Callable[..., Any]) -> None:
        self._original, self._around = original, around
        functools.update_wrapper(self, original)

    @outside_compilation
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._around(self._original, args, kwargs)


def wrap_method(owner: Any, name: str, around: Callable[..., Any]) -> Replacement:
    """Run a function around a method of an instance; see :class:`Around`."""
    return replace_method(owner, name, Around(getattr(owner, name), around))


class Walk(Protocol):
    """The state of one encoding."""

    def run(self, block: BlockCall, hidden: Tensor, arguments: dict[str, Any]) -> Any:
        """Run a block on hidden states, with its further arguments by name."""
        ...

    def catch(self, name: str, output: Tensor) -> None:
        """Keep queries or keys of the block under way."""
        ...

    def release(self) -> None:
        """Let go of features when the encoding is over."""
        ...


AnyWalk = TypeVar("AnyWalk", bound=Walk)


class _UnderWay(threading.local):
    """The encoding under way; threads may share a model."""

    walk: Any = None


class BlockStack(Uncopyable, Generic[AnyWalk]):
    """The blocks of an encoder while stages are attached.

    Outside :meth:`walking` they run as they always do.

    Args:
        encoder: the module that holds them.
        stages: those at the vision site.
        prefix: class and register tokens at the beginning of its sequences.

    Raises:
        UnsupportedModel: if a stage would have no effect in blocks of this kind.
        MissingSignal: if a strategy needs what blocks of this kind do not give.
        AttachmentError: if stages are attached to these blocks already.
    """

    def __init__(self, encoder: nn.Module, stages: Sequence[Stage], prefix: int) -> None:
        self.blocks, self.kind = find_blocks(encoder)
        self._under_way = _UnderWay()
        self.signals = frozenset(name for stage in stages for name in stage.reducer.needs)
        attentions = [getattr(block, self.kind.attention) for block in self.blocks]
        _check_signals(encoder, self.kind, self.signals, attentions[0], prefix)
        merges = any(stage.reducer.record.kind == "merge" for stage in stages)
        if merges and not takes_bias(attentions[0]):
            raise UnsupportedModel(
                f"{type(encoder).__name__} runs an attention kernel that takes no additive mask "
                f"({attentions[0].config._attn_implementation}), which merged tokens need. Load "
                "the model with attn_implementation='sdpa', or use a strategy that only drops."
            )
        if any(isinstance(vars(block).get("forward"), Around) for block in self.blocks):
            raise AttachmentError(
                f"a pipeline is attached to this {type(encoder).__name__} already. Detach it "
                "first, or attach one pipeline with several stages."
            )
        self._handles: list[RemovableHandle] = []
        self._replaced: list[Replacement] = []
        for index, (block, attention) in enumerate(zip(self.blocks, attentions, strict=True)):
            signature = inspect.signature(type(block).forward)
            around = functools.partial(self._run, index, attention, signature)
            self._replaced.append(wrap_method(block, "forward", around))
            for name in ("keys", "queries"):
                if name == "keys" or "class_attention" in self.signals:
                    module: nn.Module = getattr(attention, getattr(self.kind, name))
                    catch = functools.partial(self._catch, name)
                    self._handles.append(module.register_forward_hook(catch))
            if self.kind.mask is None:
                self._handles.append(
                    attention.register_forward_pre_hook(self._give_mask, with_kwargs=True)
                )

    @contextmanager
    def walking(self, walk: AnyWalk) -> Iterator[AnyWalk]:
        """Stages act while the context is open, in this thread."""
        before, self._under_way.walk = self._under_way.walk, walk
        try:
            yield walk
        finally:
            self._under_way.walk = before
            walk.release()

    @property
    def walk(self) -> AnyWalk | None:
        """The encoding under way in this thread."""
        walk: AnyWalk | None = self._under_way.walk
        return walk

    def detach(self) -> None:
        """Leave the blocks as they were.

        Raises:
            AttachmentError: see :func:`restore_methods`.
        """
        for handle in self._handles:
            handle.remove()
        replaced, self._replaced = self._replaced, []
        restore_methods(replaced)

    def _run(
        self,
        index: int,
        attention: nn.Module,
        signature: inspect.Signature,
        call: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        walk, block = self.walk, self.blocks[index]
        if walk is None:
            return call(*args, **kwargs)
        self._check_checkpointing(block)
        named = dict(signature.bind(block, *args, **kwargs).arguments)
        named.update(named.pop("kwargs", {}))
        _, (_, hidden), *further = named.items()  # the block itself comes first
        called = BlockCall(index, block, attention, self.kind.mask, call)
        return walk.run(called, hidden, dict(further))

    def _check_checkpointing(self, block: Any) -> None:
        """Refuse what would run hooks a second time, outside of the encoding."""
        # A class of blocks that is called in its own way recomputes its hooks too (transformers
        # before 5.23).
        replays = type(block).__call__ is not nn.Module.__call__
        exposed = self.kind.mask is None or replays
        inside = exposed and getattr(block, "gradient_checkpointing", False)
        if block.training and inside:
            raise UnsupportedModel(
                f"gradient checkpointing would recompute {type(block).__name__} without what "
                "stages made of its tokens. Disable checkpointing of the vision encoder while the "
                "pipeline is attached."
            )

    @outside_compilation
    def _catch(self, name: str, _: nn.Module, args: Any, output: Tensor) -> None:
        if self.walk is not None:
            self.walk.catch(name, output)

    @outside_compilation
    def _give_mask(
        self, attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        walk = self.walk
        if not isinstance(walk, DenseWalk):
            return None
        mask = walk.attention_mask(args[0], attention)
        return None if mask is None else (args, {**kwargs, "attention_mask": mask})


def _check_signals(
    encoder: nn.Module,
    kind: BlockKind,
    wanted: Collection[str],
    attention: nn.Module,
    prefix: int,
) -> None:
    offered = {"keys"}
    rotary = kind.packed or "rope" in inspect.signature(type(attention).forward).parameters
    if prefix and not rotary:
        offered.add("class_attention")
    missing = sorted(set(wanted) - offered)
    if missing:
        raise MissingSignal(
            f"a strategy inside the blocks of {type(encoder).__name__} needs "
            f"{', '.join(map(repr, missing))}; there it can read {', '.join(sorted(offered))} and "
            "the hidden states. Use another strategy, or the projector site."
        )
