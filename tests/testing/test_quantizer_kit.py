"""Quantizers broken on purpose, each caught by exactly the check that is meant to."""

import pytest
import torch
from torch import nn

from support.defects import Defects
from tokenreduce.errors import PipelineError, RegistrationError, UnknownName
from tokenreduce.plugins import installed
from tokenreduce.testing import CheckFailed, parametrize_quantizer_checks, run_quantizer_checks
from tokenreduce.testing.quantizers import QUANTIZER_CHECKS

pytest.importorskip("torchao", reason="needs the extra quant")
pytest.importorskip("bitsandbytes", reason="needs the extra quant")

from tokenreduce_integrations.quantization.ao import TorchAO

OPTIONS = {"scheme": "int8_weight_only"}
BROKEN = Defects()
caught_by = BROKEN.caught_by


@caught_by("interface")
class NeedsArguments(TorchAO):
    def __init__(self, scheme):
        self.scheme = scheme


@caught_by("arguments")
class QuantizesNothing(TorchAO):
    def load_arguments(self, options, *, device, model):
        super().load_arguments(options, device=device, model=model)
        return {}


@caught_by("arguments")
class ChoosesTheType(TorchAO):
    def load_arguments(self, options, *, device, model):
        given = super().load_arguments(options, device=device, model=model)
        return {**given, "dtype": torch.bfloat16}


@caught_by("options")
class TakesAnyOption(TorchAO):
    def load_arguments(self, options, *, device, model):
        known = {name: value for name, value in options.items() if name in self.known}
        return super().load_arguments(known, device=device, model=model)


@caught_by("device")
class TakesAnyDevice(TorchAO):
    def load_arguments(self, options, *, device, model):
        return super().load_arguments(options, device=torch.device("cpu"), model=model)


@caught_by("no-weights")
class LooksAtWeights(TorchAO):
    def load_arguments(self, options, *, device, model):
        assert next(model.parameters()).abs().max() < 1e6
        return super().load_arguments(options, device=device, model=model)


@caught_by("no-mutation")
class TakesItsOptionsAway(TorchAO):
    def load_arguments(self, options, *, device, model):
        scheme = options.pop("scheme")
        return super().load_arguments({"scheme": scheme, **options}, device=device, model=model)


@caught_by("no-mutation")
class QuantizesAtOnce(TorchAO):
    def load_arguments(self, options, *, device, model):
        given = super().load_arguments(options, device=device, model=model)
        next(m for m in model.modules() if isinstance(m, nn.Linear)).quantized = True
        return given


CONFIGURATION = []


@caught_by("determinism")
class SharesItsConfiguration(TorchAO):
    def load_arguments(self, options, *, device, model):
        given = super().load_arguments(options, device=device, model=model)
        CONFIGURATION[:] = CONFIGURATION or [given["quantization_config"]]
        return {"quantization_config": CONFIGURATION[0]}


@caught_by("loads")
class DoesNotLoad(TorchAO):
    def load_arguments(self, options, *, device, model):
        given = super().load_arguments(options, device=device, model=model)
        return {**given, "no_such_argument": 1}


@caught_by("loads")
class ChangesNothing(TorchAO):
    def load_arguments(self, options, *, device, model):
        super().load_arguments(options, device=device, model=model)
        return {"low_cpu_mem_usage": True}


@pytest.mark.parametrize("name", BROKEN)
def test_caught_by_exactly_the_right_check(name):
    backend, expected = BROKEN[name]
    results = run_quantizer_checks(backend, OPTIONS)
    failed = {result.check: result.detail for result in results if result.outcome == "failed"}
    assert set(failed) == expected, failed
    for result in results:
        if result.error is not None:
            assert isinstance(result.error, CheckFailed)
            assert f"quantizer '{name}'" in str(result.error)
    assert "backend-under-test" not in installed().quantizers


def test_a_model_that_says_something_else_is_caught():
    coarse = {"scheme": "intx_weight_only", "bits": 1}
    results = {r.check: r for r in run_quantizer_checks("torchao", coarse)}
    assert "like those of the model" in results["loads"].detail
    assert results["composes"].outcome == "blocked"


def test_every_check_is_explained():
    for name, check in QUANTIZER_CHECKS.items():
        assert check.name == name
        assert check.meaning.endswith(".")
        assert set(check.after) <= set(QUANTIZER_CHECKS)


@parametrize_quantizer_checks("torchao", OPTIONS)
def test_torchao_is_sound(check):
    check()


def test_wrong_options_are_the_finding_of_every_check():
    results = run_quantizer_checks("torchao", {"scheme": "int9"})
    assert [r.check for r in results if r.outcome == "failed"] == ["arguments"]
    assert PipelineError.__name__ in str(results[1].error)


def test_unknown_names():
    with pytest.raises(UnknownName, match="torchao"):
        run_quantizer_checks("torchoa")
    with pytest.raises(UnknownName, match="device"):
        run_quantizer_checks("torchao", OPTIONS, {"devic": "no such check"})
    with pytest.raises(RegistrationError, match="a name or a class"):
        run_quantizer_checks(3)
