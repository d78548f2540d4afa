"""Every way of generating that transformers offers, over a reduced sequence."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache

import tokenreduce as tr
from support import reference
from support.reducers import UnevenRandom
from support.tiny_models import IMAGE, Case, llava, words
from tokenreduce.errors import AttachmentError

STEPS = 6
REDUCER = UnevenRandom()


def new_ids(case: Case, **options: Any) -> torch.Tensor:
    """Ids ``(B, steps)`` that the model adds to its prompts."""
    options = {"do_sample": False, "max_new_tokens": STEPS, **options}
    with torch.no_grad():
        ids = case.model.generate(**case.batch(), **options)
    return ids[:, case.inputs["input_ids"].shape[1] :]


def first_prompt(case: Case) -> Case:
    """The first prompt alone; only for prompts with one image, without padding."""
    inputs = {name: value[:1] for name, value in case.inputs.items()}
    return Case(case.model, inputs, case.items[:1])


@pytest.fixture
def one() -> Case:
    return first_prompt(llava())


def prefilled(case: Case) -> Any:
    with torch.no_grad():
        return case.model(**case.batch(), use_cache=True).past_key_values


# -- what becomes of a cache ----------------------------------------------------------------------


class Interrupt:
    """A hook that acts as Ctrl-C while a layer of the decoder runs."""

    def __init__(self, case: Case, layer: int) -> None:
        layers = reference.text_decoder(case.model).layers
        self.handle = layers[layer].register_forward_pre_hook(self)

    def __call__(self, *_: Any) -> None:
        self.handle.remove()
        raise KeyboardInterrupt


def test_an_interrupted_step_leaves_a_cache_that_tells_its_length(one: Case) -> None:
    length = one.inputs["input_ids"].shape[1]
    token = torch.tensor([[30]])
    with tr.attach(one.model, REDUCER), torch.no_grad():
        expected = one.model(input_ids=token, past_key_values=prefilled(one)).logits
        cache = prefilled(one)
        Interrupt(one, layer=0)
        with pytest.raises(KeyboardInterrupt):
            one.model(input_ids=token, past_key_values=cache)
        assert cache.get_seq_length() == length
        again = one.model(input_ids=token, past_key_values=cache)
        assert torch.equal(again.logits, expected)
        assert again.past_key_values is cache
        assert cache.get_seq_length() == length + 1


def test_an_interrupted_prefill_leaves_a_cache_that_tells_its_length(one: Case) -> None:
    length = one.inputs["input_ids"].shape[1]
    with tr.attach(one.model, REDUCER), torch.no_grad():
        cache = DynamicCache(config=one.model.config.get_text_config())
        for layer, held in ((0, 0), (2, length)):
            Interrupt(one, layer)
            with pytest.raises(KeyboardInterrupt):
                one.model(**one.batch(), past_key_values=cache)
            assert cache.get_seq_length() == held
    with pytest.raises(AttachmentError, match="continue it while"):
        one.model(input_ids=torch.tensor([[30]]), past_key_values=cache)


def test_a_cache_can_be_cropped_to_where_visual_tokens_end(one: Case) -> None:
    ids = one.inputs["input_ids"]
    end = int((ids[0] == IMAGE).nonzero()[-1]) + 1
    after = ids.shape[1] - end
    question = torch.tensor([words(4, 11)])
    with tr.attach(one.model, REDUCER), torch.no_grad():
        short = {name: value[:, :end] for name, value in one.inputs.items() if value.ndim == 2}
        beginning = one.model(**one.batch() | short, use_cache=True).past_key_values
        expected = one.model(input_ids=question, past_key_values=beginning).logits
        cache = prefilled(one)
        one.model(input_ids=torch.tensor([words(3, 12)]), past_key_values=cache)
        cache.crop(-(3 + after))
        assert cache.get_seq_length() == end
        logits = one.model(input_ids=question, past_key_values=cache).logits
        assert (logits - expected).abs().max() < 1e-5


def test_a_cache_cannot_be_cropped_inside_visual_tokens(one: Case) -> None:
    with tr.attach(one.model, REDUCER):
        cache = prefilled(one)
        length = cache.get_seq_length()
        held = cache.held_length()
        with pytest.raises(AttachmentError, match="cannot be cropped by 15 tokens"):
            cache.crop(-15)
        assert (cache.get_seq_length(), cache.held_length()) == (length, held)
        cache.crop(-length)
        assert cache.get_seq_length() == 0
        assert torch.equal(new_ids(one, past_key_values=cache), new_ids(one))


# -- controls -------------------------------------------------------------------------------------


def test_controls_are_refused_after_detaching(one: Case) -> None:
    with tr.attach(one.model, tr.create_strategy("norm-topk", keep=4)) as run:
        new_ids(one)
    assert run.receipt.tokens_out == 4
    for control in (run.disabled(), run.budget(keep=8)):
        with pytest.raises(AttachmentError, match="was detached"), control:
            pass
