"""Cross-attention to fewer visual tokens, against a recomputation that masks out the others."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import tokenreduce as tr
from support import support_matrix
from support.reducers import EveryOther, UnevenRandom
from support.tiny_families import mllama
from support.tiny_models import Case
from tokenreduce.errors import AttachmentError, TokensError, UnsupportedModel

STEPS = 4


def generate(case: Case, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.no_grad():
        result = case.model.generate(
            **case.batch(),
            **{"do_sample": False, "max_new_tokens": STEPS, **options},
            return_dict_in_generate=True,
            output_logits=True,
        )
    return result.sequences[:, -STEPS:], torch.stack(result.logits)


def forward(case: Case) -> torch.Tensor:
    with torch.no_grad():
        return case.model(**case.batch()).logits


def captured(case: Case) -> dict[str, Any]:
    """The arguments of the decoder in the unmodified prefill."""
    found: dict[str, Any] = {}

    def capture(_: Any, __: Any, kwargs: dict[str, Any]) -> None:
        found.update(kwargs)

    handle = case.model.model.language_model.register_forward_pre_hook(capture, with_kwargs=True)
    forward(case)
    handle.remove()
    return found


@torch.no_grad()
def expected(case: Case, reducer: tr.Reducer, row: int, steps: int) -> tuple[list[int], Any]:
    """Greedy decoding of one prompt, whole at each step, over all visual tokens in their places."""
    prefill = captured(case)
    real = case.inputs["attention_mask"][row].bool()
    ids = case.inputs["input_ids"][row][real].tolist()
    states = prefill["cross_attention_states"].reshape(2, -1, 64)[row].clone()
    mask = prefill["cross_attention_mask"][row][:, real].clone()
    opened = prefill["full_text_row_masked_out_mask"][row][:, real]
    item = case.items[row]
    tokens = torch.arange(len(item.coords))
    protected = torch.zeros(len(tokens), dtype=torch.bool)
    protected[list(item.protected)] = True
    result = reducer(
        tr.VisualTokens(states[tokens][None], torch.tensor(item.coords), protected=protected)
    )
    states[result.positions[0]] = result.features[0]
    # Places of tiles that the image does not have go too, whatever was kept.
    gone = torch.ones(len(states), dtype=torch.bool)
    gone[result.positions[0]] = False
    mask[..., gone] = torch.finfo(mask.dtype).min
    new: list[int] = []
    logits = []
    for _ in range(steps):
        out = case.model.model.language_model(
            input_ids=torch.tensor([ids + new]),
            position_ids=torch.arange(len(ids) + len(new))[None],
            cross_attention_states=states[None],
            cross_attention_mask=torch.cat([mask, *[mask[:, -1:]] * len(new)], 1)[None],
            full_text_row_masked_out_mask=torch.cat([opened, *[opened[:, -1:]] * len(new)], 1)[
                None
            ],
            use_cache=False,
        )
        logits.append(case.model.lm_head(out.last_hidden_state)[0, -1])
        new.append(int(logits[-1].argmax()))
    return new, torch.stack(logits)


def test_keep_all_is_bit_identical_and_detach_leaves_no_trace() -> None:
    case = mllama()
    before, (ids, logits) = forward(case), generate(case)
    traces = {name: dict(vars(module)) for name, module in case.model.named_modules()}
    with tr.attach(case.model, tr.create_strategy("norm-topk", keep_ratio=1.0)) as run:
        support_matrix.describe("mllama", case, run)
        assert torch.equal(forward(case), before)
        assert torch.equal(generate(case)[0], ids)
        assert torch.equal(generate(case)[1], logits)
        assert [item.tokens_in for item in run.receipt.items] == [34, 17]
    with tr.attach(case.model, UnevenRandom()):
        assert not torch.allclose(forward(case), before, atol=1e-3)
    assert torch.equal(forward(case), before)
    for name, module in case.model.named_modules():
        assert dict(vars(module)) == traces[name]


@pytest.mark.parametrize(
    "reducer", [UnevenRandom(), EveryOther(reduction=3)], ids=["drop", "merge"]
)
def test_generation_equals_an_independent_recomputation(reducer: tr.Reducer) -> None:
    case = mllama()
    answers = [expected(case, reducer, row, STEPS) for row in range(2)]
    with tr.attach(case.model, reducer) as run:
        ids, logits = generate(case)
        uncached = generate(case, use_cache=False)[0]
        for found, item in zip(run.reductions, case.items, strict=True):
            assert torch.equal(found.layout.coords, torch.tensor(item.coords))
        assert run.receipt.tokens_out < run.receipt.tokens_in
    assert ids.tolist() == uncached.tolist() == [answer for answer, _ in answers]
    for row, (_, steps) in enumerate(answers):
        assert (logits[:, row] - steps).abs().max() < 1e-5
    for column in ("image", "generate", "batch"):
        support_matrix.proved("mllama", column)


def test_forward_equals_an_independent_recomputation() -> None:
    case = mllama()
    reducer = UnevenRandom()
    answers = [expected(case, reducer, row, 1)[1][0] for row in range(2)]
    batch = case.batch()
    batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    with tr.attach(case.model, reducer), torch.no_grad():
        logits = case.model(**batch).logits[:, -1]
    assert (logits - torch.stack(answers)).abs().max() < 1e-5
    support_matrix.proved("mllama", "forward")


def test_beams_stay_with_their_prompts() -> None:
    case = mllama()
    reducer = UnevenRandom()
    with tr.attach(case.model, reducer):
        together = generate(case, num_beams=3)[0]
        for row in range(2):
            real = case.inputs["attention_mask"][row].bool()
            alone = {name: value[row : row + 1] for name, value in case.inputs.items()}
            for name in ("input_ids", "attention_mask", "cross_attention_mask"):
                alone[name] = alone[name][:, real]
            single = Case(case.model, alone, case.items[row : row + 1])
            assert torch.equal(generate(single, num_beams=3, use_cache=False)[0][0], together[row])
    support_matrix.proved("mllama", "beams")


def test_what_it_cannot_follow_is_refused() -> None:
    case = mllama()
    with tr.attach(case.model, UnevenRandom()), torch.no_grad():
        cache = case.model(**case.batch(), use_cache=True).past_key_values
        mask = case.inputs["cross_attention_mask"][:1, -1:]
        with pytest.raises(AttachmentError, match="holds 2 prompts"):
            case.model(
                input_ids=torch.tensor([[30]]), past_key_values=cache, cross_attention_mask=mask
            )
        with pytest.raises(UnsupportedModel, match="pass pixel_values"):
            case.model(
                input_ids=case.inputs["input_ids"], cross_attention_states=torch.zeros(8, 17, 64)
            )
    with pytest.raises(AttachmentError, match="already"), tr.attach(case.model, UnevenRandom()):
        tr.attach(case.model, UnevenRandom())


def test_regions_of_tiles_are_refused() -> None:
    case = mllama()
    with (
        tr.attach(case.model, UnevenRandom(), protect=[(0, 0, 1, 1)]),
        pytest.raises(TokensError, match="regions cannot be protected"),
    ):
        forward(case)


@support_matrix.of_this_release
def test_the_matrix_shows_what_was_proved() -> None:
    support_matrix.check()
