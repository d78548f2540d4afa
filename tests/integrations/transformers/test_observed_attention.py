"""Attention rows of observed modules equal those of eager attention, and nothing else changes."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from support.tiny_models import Case, llava, qwen2_5_vl
from tokenreduce.errors import AttachmentError, UnsupportedModel
from tokenreduce_integrations.transformers.observed_attention import observe


def rows(seen: list[Tensor]) -> Any:
    """A callback that computes attention in paper notation."""

    def callback(module: Any, query: Tensor, key: Tensor, mask: Any, kwargs: Any) -> None:
        key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
        logits = query @ key.transpose(-1, -2) * kwargs["scaling"]
        if mask is None and module.is_causal:
            mask = torch.ones(logits.shape[-2:], dtype=torch.bool).tril()
        if mask is not None:
            logits = logits.masked_fill(~mask, float("-inf"))
        seen.append(logits.softmax(-1))

    return callback


def modules(case: Case) -> dict[str, Any]:
    return {
        "tower": case.model.model.vision_tower.encoder.layers[1].self_attn,
        "decoder": case.model.model.language_model.layers[2].self_attn,
    }


@pytest.mark.parametrize("name", ["tower", "decoder"])
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_rows_equal_eager_attention(name: str, side: str) -> None:
    case, seen = llava(side), list[Tensor]()
    before = case.model(**case.batch()).logits
    module = modules(case)[name]
    config, state = module.config, dict(vars(module))
    handle = observe(module, rows(seen))
    assert torch.equal(case.model(**case.batch()).logits, before)
    assert case.model.config._attn_implementation == "sdpa"
    handle.remove()
    handle.remove()
    assert module.config is config
    assert vars(module) == state
    case.model.set_attn_implementation("eager")
    eager = list[Tensor]()
    module.register_forward_hook(lambda _, __, output: eager.append(output[1]))
    case.model(**case.batch())
    valid = torch.ones(2, 17, dtype=torch.bool)
    if name == "decoder":
        valid = case.inputs["attention_mask"].bool()
    difference = (seen[0] - eager[0]).transpose(1, 2)[valid]
    assert difference.abs().max() < 1e-5


@torch.no_grad()
def test_a_kernel_chosen_meanwhile_is_run() -> None:
    case, seen, weights = llava(), list[Tensor](), list[Tensor]()
    module = modules(case)["tower"]
    observe(module, rows(seen))
    case.model.set_attn_implementation("eager")
    module.register_forward_hook(lambda _, __, output: weights.append(output[1]))
    case.model(**case.batch())
    assert (seen[0] - weights[0]).abs().max() < 1e-6


@torch.no_grad()
def test_kernels_find_the_name_that_the_model_is_set_to() -> None:
    names = list[str]()

    def kernel(module: Any, *args: Any, **kwargs: Any) -> Any:
        names.append(module.config._attn_implementation)
        return AttentionInterface()["sdpa"](module, *args, **kwargs)

    case = llava()
    AttentionInterface.register("kernel-of-a-test", kernel)
    case.model.model.vision_tower.set_attn_implementation("kernel-of-a-test")
    observe(modules(case)["tower"], lambda *_: None)
    case.model(**case.batch())
    assert names == ["kernel-of-a-test"] * 3


@torch.no_grad()
def test_segments_call_back_one_by_one() -> None:
    case, lengths = qwen2_5_vl(), list[int]()
    block = case.model.model.visual.blocks[1]
    observe(block.attn, lambda module, query, *_: lengths.append(query.shape[2]))
    case.model(**case.batch())
    assert lengths == [24, 32, 16, 16, 16]


@torch.no_grad()
def test_several_observers_leave_in_any_order() -> None:
    case, seen = llava(), list[str]()
    module = modules(case)["tower"]
    config = module.config
    first = observe(module, lambda *_: seen.append("first"))
    second = observe(module, lambda *_: seen.append("second"))
    case.model(**case.batch())
    first.remove()
    case.model(**case.batch())
    assert seen == ["first", "second", "second"]
    second.remove()
    assert module.config is config


@torch.no_grad()
def test_threads_share_an_observed_module() -> None:
    case, seen = llava(), list[int]()
    observe(modules(case)["tower"], lambda *_: seen.append(threading.get_ident()))
    expected = case.model(**case.batch()).logits
    results: list[bool] = []

    def ask() -> None:
        with torch.no_grad():
            for _ in range(3):
                results.append(torch.equal(case.model(**case.batch()).logits, expected))

    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [True] * 6
    assert len(seen) == 7


@torch.no_grad()
def test_compiled_modules_are_observed() -> None:
    case, seen = llava(), list[Tensor]()
    tower = case.model.model.vision_tower
    observe(modules(case)["tower"], rows(seen))
    expected = tower(case.inputs["pixel_values"]).last_hidden_state
    compiled = torch.compile(tower, backend="eager")
    actual = compiled(case.inputs["pixel_values"]).last_hidden_state
    assert (actual - expected).abs().max() < 1e-5
    assert len(seen) == 2
    torch.compiler.reset()


def test_a_module_that_does_not_dispatch_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match="AttentionInterface"):
        observe(nn.MultiheadAttention(8, 2), lambda *_: None)
    with pytest.raises(UnsupportedModel, match="Linear"):
        observe(nn.Linear(2, 2), lambda *_: None)


def test_an_observed_module_is_not_copied() -> None:
    module = modules(llava())["tower"]
    observe(module, lambda *_: None)
    with pytest.raises(AttachmentError, match="copied"):
        copy.deepcopy(module)


def test_a_configuration_replaced_since_is_reported() -> None:
    module = modules(llava())["tower"]
    handle = observe(module, lambda *_: None)
    module.config = copy.copy(module.config.original)
    with pytest.raises(AttachmentError, match="something else replaced"):
        handle.remove()
