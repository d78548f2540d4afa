"""Model adapters broken on purpose, each caught by exactly the check that is meant to."""

import copy
from dataclasses import replace

import pytest
import torch
from transformers import LlavaForConditionalGeneration

from support.defects import Defects
from support.tiny_models import BOS, IMAGE, llava, noise, words
from tokenreduce.attachment import Attachment
from tokenreduce.errors import AttachmentError, RegistrationError, UnknownName
from tokenreduce.testing import CheckFailed, parametrize_adapter_checks, run_adapter_checks
from tokenreduce.testing.adapters import ADAPTER_CHECKS
from tokenreduce.tokens import Layout
from tokenreduce_integrations.transformers import families
from tokenreduce_integrations.transformers.adapters import LlavaAdapter
from tokenreduce_integrations.transformers.families import LLAVA
from tokenreduce_strategies.norm_topk import NormTopK

BROKEN = Defects()
caught_by = BROKEN.caught_by
MODEL = llava().model
BARE = NormTopK()


def model():
    return copy.deepcopy(MODEL)


def inputs():
    ids = [BOS, *words(3, 1), *[IMAGE] * 16, *words(6, 2)]
    return {"input_ids": torch.tensor([ids]), "pixel_values": noise(1, 3, 56, 56)}


@caught_by("interface")
class NeedsArguments(LlavaAdapter):
    def __init__(self, family):
        self.family = family


@caught_by("interface")
class CannotCheck:
    attach = LlavaAdapter.attach


@caught_by("check")
class ReadsWeightsToCheck(LlavaAdapter):
    def check(self, model, *others):
        super().check(model, *others)
        next(model.parameters()).sum().item()


@caught_by("check")
class MarksWhatItChecks(LlavaAdapter):
    def check(self, model, *others):
        super().check(model, *others)
        if next(model.parameters()).is_meta:
            model.was_checked = True


class Idle(Attachment):
    """Does nothing at all."""

    def detach(self):
        self.attached = False

    def disabled(self):
        raise NotImplementedError


@caught_by("engages")
class DoesNothing(LlavaAdapter):
    def attach(self, model, stages, processor=None, joint_encoder=None):
        return Idle(model, stages)


@caught_by("engages")
class IgnoresTheBudget(LlavaAdapter):
    def attach(self, model, stages, processor=None, joint_encoder=None):
        wide = tuple(
            replace(stage, reducer=stage.reducer.with_budget(keep=stage.reducer.keep + 1))
            for stage in stages
        )
        return super().attach(model, wide, processor, joint_encoder)


def transposed(owner, features, arguments):
    return [Layout.from_grid((1, len(feature), 1)) for feature in features]


@caught_by("items")
class LaysOutAColumn(LlavaAdapter):
    family = replace(LLAVA, layouts={"image": transposed})


def piled(owner, features, arguments):
    return [Layout(torch.zeros(len(feature), 4, dtype=torch.long)) for feature in features]


@caught_by("items")
class PilesTokensUp(LlavaAdapter):
    family = replace(LLAVA, layouts={"image": piled})


class Sabotaged(LlavaAdapter):
    """Attaches as it should, and puts a hook in front of the first layer."""

    def meddle(self, args, kwargs):
        raise NotImplementedError

    def attach(self, model, stages, processor=None, joint_encoder=None):
        run = super().attach(model, stages, processor, joint_encoder)
        layer = families.find_decoder(model).layers[0]
        handle = layer.register_forward_pre_hook(
            lambda module, args, kwargs: self.meddle(args, kwargs), with_kwargs=True
        )
        detach = run.detach

        def remove():
            handle.remove()
            detach()

        run.detach = remove
        return run


def shortened(states):
    return states.shape[1] < 26


@caught_by("reads")
class ReversesWhatIsKept(Sabotaged):
    def meddle(self, args, kwargs):
        return ((args[0].flip(1),), kwargs) if shortened(args[0]) else None


@caught_by("reads")
class ScalesWhatIsKept(Sabotaged):
    def meddle(self, args, kwargs):
        return ((args[0] * 1.01,), kwargs) if shortened(args[0]) else None


@caught_by("positions")
class CountsPositionsAnew(Sabotaged):
    def meddle(self, args, kwargs):
        if not shortened(args[0]):
            return None
        cos, sin = kwargs["position_embeddings"]
        return args, {**kwargs, "position_embeddings": (cos.roll(1, 1), sin.roll(1, 1))}


@caught_by("keep-all")
class AddsALittle(Sabotaged):
    def meddle(self, args, kwargs):
        return None if shortened(args[0]) else ((args[0] + 1e-3,), kwargs)


@caught_by("detach")
class LeavesAHook(LlavaAdapter):
    def attach(self, model, *others):
        model.register_forward_pre_hook(lambda *_: None)
        return super().attach(model, *others)


@caught_by("detach")
class LeavesAnAttribute(LlavaAdapter):
    def attach(self, model, *others):
        run = super().attach(model, *others)
        model.model.reduced = True
        return run


@caught_by("detach")
class ChangesTheConfiguration(LlavaAdapter):
    def attach(self, model, *others):
        run = super().attach(model, *others)
        model.config.fewer_tokens = True
        return run


@caught_by("instances")
class PatchesTheClass(LlavaAdapter):
    def attach(self, model, *others):
        run = super().attach(model, *others)
        detach, own = run.detach, LlavaForConditionalGeneration.forward

        def restore():
            LlavaForConditionalGeneration.forward = own
            detach()

        LlavaForConditionalGeneration.forward = lambda self, *args, **kwargs: own(
            self, *args, **kwargs
        )
        run.detach = restore
        return run


@caught_by("twice")
class ReplacesTheFirst(LlavaAdapter):
    attached = None

    def attach(self, model, *others):
        try:
            run = super().attach(model, *others)
        except AttachmentError:
            type(self).attached.detach()
            run = super().attach(model, *others)
        type(self).attached = run
        return run


@caught_by("no-mutation")
class WritesThePicture(LlavaAdapter):
    def attach(self, model, *others):
        run = super().attach(model, *others)

        def blacken(module, args, kwargs, output):
            kwargs["pixel_values"].zero_()

        handle = model.register_forward_hook(blacken, with_kwargs=True)
        detach = run.detach

        def remove():
            handle.remove()
            detach()

        run.detach = remove
        return run


@caught_by("refuses")
class TakesAnything(LlavaAdapter):
    def _check(self, *others):
        pass

    def attach(self, model, stages, processor=None, joint_encoder=None):
        stages = [s for s in stages if not s.reducer.needs] or [
            replace(stages[0], reducer=BARE.with_budget(keep=5))
        ]
        return super().attach(model, tuple(stages), processor, joint_encoder)


@caught_by("refuses")
class FailsInsteadOfRefusing(LlavaAdapter):
    def check(self, model, stages, processor=None, joint_encoder=None):
        if stages[0].site == "frames":
            raise KeyError("frames")
        super().check(model, stages, processor, joint_encoder)


@caught_by("generate")
class ForgetsWhatWasGenerated(Sabotaged):
    def meddle(self, args, kwargs):
        return ((args[0] * 0,), kwargs) if args[0].shape[1] == 1 else None


def checks_of(adapter, **others):
    return run_adapter_checks(adapter, model, inputs, grids=((1, 4, 4),), **others)


@pytest.mark.parametrize("name", BROKEN)
def test_caught_by_exactly_the_right_check(name):
    adapter, expected = BROKEN[name]
    results = checks_of(adapter)
    failed = {result.check: result.detail for result in results if result.outcome == "failed"}
    assert set(failed) == expected, failed
    for result in results:
        if result.error is not None:
            assert isinstance(result.error, CheckFailed)
            assert f"model adapter '{name}'" in str(result.error)


def test_an_adapter_of_other_models_is_not_found():
    results = {r.check: r for r in checks_of("qwen2-vl")}
    assert results["serves"].outcome == "failed"
    assert "which LlavaAdapter serves" in results["serves"].detail


def test_every_check_is_explained():
    for name, check in ADAPTER_CHECKS.items():
        assert check.name == name
        assert check.meaning.endswith(".")
        assert set(check.after) <= set(ADAPTER_CHECKS)


@parametrize_adapter_checks("llava", model, inputs, grids=((1, 4, 4),))
def test_the_adapter_of_llava_is_sound(check):
    check()


def test_several_prompts_are_sound_too():
    case = llava()
    results = run_adapter_checks("llava", model, case.batch)
    assert [r for r in results if not r.ok] == []
    assert {r.check for r in results if r.outcome == "does not apply"} == {"reads", "positions"}


def test_unknown_names():
    with pytest.raises(UnknownName, match="llava"):
        checks_of("lava")
    with pytest.raises(UnknownName, match="positions"):
        checks_of("llava", expected_failures={"position": "no such check"})
    with pytest.raises(RegistrationError, match="a name or a class"):
        checks_of(3)
