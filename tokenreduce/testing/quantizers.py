"""Checks of quantization backends, on a model that is really loaded through them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tokenreduce.api import create_strategy
from tokenreduce.attachment import find_loader
from tokenreduce.backends import Quantizer
from tokenreduce.errors import PipelineError, RegistrationError
from tokenreduce.pipeline import BuiltPipeline, ModelSettings, Pipeline
from tokenreduce.plugins import installed
from tokenreduce.stage import Stage
from tokenreduce.testing.check import Checks, fail
from tokenreduce.testing.kit import NONE, CheckResult, Run, parametrized
from tokenreduce.testing.traces import trace_of

#: What the loading of a model decides by itself.
RESERVED = ("config", "state_dict", "dtype", "use_safetensors", "attn_implementation")
#: The name by which pipelines find a backend that is not registered, while it is checked.
UNDER_TEST = "backend-under-test"
KEPT = 12


def example_inputs(processor: Any) -> dict[str, Tensor]:
    """A question about a picture of noise, in the words of the testbed's models."""
    picture = np.random.default_rng(0).integers(0, 255, (96, 96, 3), dtype=np.uint8)
    text = "<image> USER: what digit is shown ? ASSISTANT:"
    return dict(processor(images=picture, text=text, return_tensors="pt"))


@dataclass(frozen=True, kw_only=True)
class QuantizerSubject:
    """A quantization backend under test.

    Attributes:
        name: what to call it.
        factory: makes an instance, as the loading of a model does.
        options: what a pipeline would say of it, beside its name.
        path: the model to load.
        adapter: whose loader reads the model.
        inputs: makes inputs of the model from its processor.
        similarity: least cosine of the logits with those of the model as it is.
    """

    name: str
    factory: Callable[[], Quantizer]
    options: Mapping[str, Any] = field(default_factory=dict)
    path: str = "testbed:b"
    adapter: str = "transformers"
    inputs: Callable[[Any], Mapping[str, Tensor]] = example_inputs
    similarity: float = 0.9

    def load_arguments(
        self,
        model: nn.Module,
        *,
        device: str = "cpu",
        options: Mapping[str, Any] | None = None,
    ) -> Mapping[str, Any]:
        """What a new instance gives for the loading of a model."""
        given = dict(self.options if options is None else options)
        return self.factory().load_arguments(given, device=torch.device(device), model=model)

    def whole(self) -> tuple[Any, Any]:
        """A copy of the model as it is, and its processor."""
        model, processor = _loaded(self.path, self.adapter)
        return copy.deepcopy(model), processor

    def built(self, keep: int) -> BuiltPipeline:
        """The model, quantized on its way in, with a stage that keeps so many tokens."""
        stage = Stage(reducer=create_strategy("norm-topk", keep=keep))
        with _registered(self):
            quantization = {"backend": UNDER_TEST, **self.options}
            settings = _settings(self.path, self.adapter, quantization=quantization)
            return Pipeline(stages=(stage,), model=settings).build()


QUANTIZER_CHECKS: Checks[QuantizerSubject] = Checks()


def _settings(path: str, adapter: str, **others: Any) -> ModelSettings:
    return ModelSettings(path=path, adapter=adapter, dtype="float32", device="cpu", **others)


@lru_cache(maxsize=1)
def _loaded(path: str, adapter: str) -> tuple[Any, Any]:
    model, processor = find_loader(adapter)(_settings(path, adapter), ())
    return model, processor


_FACTORY: list[Callable[[], Quantizer]] = []


def _made() -> Quantizer:
    return _FACTORY[-1]()


@contextmanager
def _registered(subject: QuantizerSubject) -> Iterator[None]:
    registry = installed().quantizers
    registry.add(registry.make_record(name=UNDER_TEST, target=f"{__name__}:{_made.__name__}"))
    _FACTORY.append(subject.factory)
    try:
        yield
    finally:
        _FACTORY.pop()
        registry.remove(UNDER_TEST)


@QUANTIZER_CHECKS.add("interface")
def check_interface(subject: QuantizerSubject) -> None:
    """It is made without arguments, and has the method load_arguments."""
    try:
        backend = subject.factory()
    except TypeError as error:
        fail(f"cannot be created without arguments: {error}")
    if not callable(getattr(backend, "load_arguments", None)):
        fail("has no method load_arguments")


@QUANTIZER_CHECKS.add("arguments", after=("interface",))
def check_arguments(subject: QuantizerSubject) -> None:
    """It gives arguments by name, and none that the loading decides by itself."""
    given = subject.load_arguments(subject.whole()[0])
    if not isinstance(given, Mapping) or not all(isinstance(name, str) for name in given):
        fail(f"returned {type(given).__name__}, expected a mapping of argument names")
    if not given:
        fail("returned no argument, so that nothing would be quantized")
    for name in RESERVED:
        if name in given:
            fail(f"returned {name!r}, which the loading of a model decides by itself")


@QUANTIZER_CHECKS.add("options", after=("arguments",))
def check_options(subject: QuantizerSubject) -> None:
    """An unknown option raises a PipelineError."""
    model = subject.whole()[0]
    try:
        subject.load_arguments(model, options={**subject.options, "no_such_option": 1})
    except PipelineError:
        return
    fail(
        "took the option 'no_such_option' without a PipelineError: a misspelt one would do nothing"
    )


@QUANTIZER_CHECKS.add("device", after=("arguments",))
def check_device(subject: QuantizerSubject) -> None:
    """A device that cannot run the result raises a PipelineError, before anything is loaded."""
    try:
        subject.load_arguments(subject.whole()[0], device="meta")
    except PipelineError:
        return
    fail("took the device 'meta', which computes nothing, without a PipelineError")


@QUANTIZER_CHECKS.add("no-weights", after=("arguments",))
def check_no_weights(subject: QuantizerSubject) -> None:
    """It decides without weights, on a model of the meta device."""
    model = subject.whole()[0]
    with_weights = subject.load_arguments(model)
    try:
        without = subject.load_arguments(model.to("meta"))
    except Exception as error:  # noqa: BLE001 (whatever it raises is the finding)
        fail(f"raised {type(error).__name__} for a model without weights: {error}")
    if _text(with_weights) != _text(without):
        fail("gives other arguments for a model without weights")


@QUANTIZER_CHECKS.add("no-mutation", after=("arguments",))
def check_no_mutation(subject: QuantizerSubject) -> None:
    """The options and the model that it is asked about are left as they were."""
    model = subject.whole()[0]
    options = copy.deepcopy(dict(subject.options))
    before, weights = trace_of(model), {n: p.clone() for n, p in model.state_dict().items()}
    subject.factory().load_arguments(options, device=torch.device("cpu"), model=model)
    if options != dict(subject.options):
        fail(f"changed the options that it was given, to {options}")
    difference = before.difference(trace_of(model))
    if difference:
        fail(f"changed the model that it was asked about: {difference}")
    changed = [n for n, p in model.state_dict().items() if not torch.equal(p, weights[n])]
    if changed:
        fail(f"changed the weights of the model that it was asked about: {changed[0]}")


@QUANTIZER_CHECKS.add("determinism", after=("arguments",))
def check_determinism(subject: QuantizerSubject) -> None:
    """It gives the same arguments each time, in objects of their own."""
    model = subject.whole()[0]
    first, second = subject.load_arguments(model), subject.load_arguments(model)
    if _text(first) != _text(second):
        fail("gave other arguments when it was asked again")
    plain = (str, int, float, bool, type(None), torch.dtype, torch.device)
    for name, value in first.items():
        if value is second.get(name) and not isinstance(value, plain):
            fail(
                f"gives the same object for {name!r} each time: loading one model changes the next"
            )


@QUANTIZER_CHECKS.add("loads", after=("no-weights", "no-mutation"))
def check_loads(subject: QuantizerSubject) -> None:
    """A model loads with what it gives, takes less memory, and says nearly the same."""
    whole, processor = subject.whole()
    with torch.no_grad():
        expected = whole(**subject.inputs(processor)).logits[:, -1].float()
    model, processor, run = subject.built(1 << 20)
    run.detach()
    with torch.no_grad():
        found = model(**subject.inputs(processor)).logits[:, -1].float()
    if not bool(found.isfinite().all()):
        fail("gives a model whose logits are not finite")
    similar = float(torch.nn.functional.cosine_similarity(expected, found).min())
    if similar < subject.similarity:
        fail(
            f"gives a model whose logits are no more than {similar:.3f} like those of the model as "
            f"it is (cosine), expected {subject.similarity:g}"
        )
    before, after = _bytes(whole), _bytes(model)
    if after >= before:
        fail(f"gives a model of {after} bytes, that of the model as it is has {before}")


@QUANTIZER_CHECKS.add("composes", after=("loads",))
def check_composes(subject: QuantizerSubject) -> None:
    """Stages run on the quantized model."""
    model, processor, run = subject.built(KEPT)
    with run, torch.no_grad():
        logits = model(**subject.inputs(processor)).logits
        if any(item.tokens_out != KEPT for item in run.receipt.items):
            fail(f"gives a model on which a budget of {KEPT} tokens is not met")
    if not bool(logits.isfinite().all()):
        fail("gives a model whose logits are not finite when tokens are reduced")


def _bytes(model: nn.Module) -> int:
    tensors = {tensor.data_ptr(): tensor for tensor in (*model.parameters(), *model.buffers())}
    return sum(_held(tensor) for tensor in tensors.values())


def _held(tensor: Tensor) -> int:
    """Bytes of a tensor, or of those that a quantized one is made of."""
    if hasattr(tensor, "__tensor_flatten__"):
        names, _ = tensor.__tensor_flatten__()
        return sum(_held(getattr(tensor, name)) for name in names)
    return tensor.numel() * tensor.element_size()


def _text(arguments: Mapping[str, Any]) -> str:
    """Arguments as they can be compared."""
    parts = []
    for name, value in sorted(arguments.items()):
        plain = value.to_dict() if hasattr(value, "to_dict") else value
        parts.append(f"{name}={plain!r}")
    return ", ".join(parts)


def run_quantizer_checks(
    backend: str | type[Any],
    options: Mapping[str, Any] = NONE,
    expected_failures: Mapping[str, str] = NONE,
    **subject: Any,
) -> list[CheckResult]:
    """Run every check on a quantization backend.

    Args:
        backend: a registered name, or a class.
        options: what a pipeline would say of it, beside its name.
        expected_failures: as for :func:`tokenreduce.testing.run_checks`.
        subject: further fields of :class:`QuantizerSubject`: another model, or ``similarity``.

    Raises:
        UnknownName: if nothing registered the backend, or there is no such check.
        RegistrationError: if it is neither a name nor a class.
    """
    return _run_of(backend, options, expected_failures, subject).all()


def parametrize_quantizer_checks(
    backend: str | type[Any],
    options: Mapping[str, Any] = NONE,
    expected_failures: Mapping[str, str] = NONE,
    **subject: Any,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Make a pytest test of every check of a backend; see :func:`run_quantizer_checks`."""
    decorator: Callable[[Callable[..., Any]], Callable[..., Any]] = parametrized(
        [_run_of(backend, options, expected_failures, subject)]
    )
    return decorator


def _run_of(
    backend: str | type[Any],
    options: Mapping[str, Any],
    expected_failures: Mapping[str, str],
    subject: Mapping[str, Any],
) -> Run[QuantizerSubject]:
    if isinstance(backend, str):
        name, factory = backend, installed().quantizers.resolve(backend)
    elif callable(backend):
        name, factory = getattr(backend, "__name__", repr(backend)), backend
    else:
        raise RegistrationError(f"a quantizer is a name or a class, got {backend!r}.")
    checked = QuantizerSubject(name=name, factory=factory, options=dict(options), **subject)
    return Run(QUANTIZER_CHECKS, checked, expected_failures, kind="quantizer")
