"""Training, adapters, devices and copies of a model with a pipeline attached."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import accelerate
import peft
import pytest
import torch
from accelerate.hooks import remove_hook_from_submodules
from safetensors.torch import load_file

import tokenreduce as tr
from support import reference
from support.reducers import EveryOther, UnevenRandom
from support.tiny_models import IMAGE, Case, llava, qwen2_5_vl, qwen3_vl
from tokenreduce.errors import AttachmentError, UnsupportedModel

STEPS = 4
REDUCER = UnevenRandom()
# Early releases take the device of a model for that of its parameters while they are away.
OFFLOADING_WARNS = pytest.mark.filterwarnings("ignore:You are calling .generate:UserWarning")
# Adding a model's adapters warns of a name that transformers has deprecated.
PEFT_WARNS = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


def new_ids(case: Case, model: Any = None) -> torch.Tensor:
    with torch.no_grad():
        ids = (model or case.model).generate(**case.batch(), do_sample=False, max_new_tokens=STEPS)
    return ids[:, case.inputs["input_ids"].shape[1] :]


def logits(case: Case, model: Any = None) -> torch.Tensor:
    with torch.no_grad():
        return (model or case.model)(**case.batch()).logits


def labels(case: Case) -> torch.Tensor:
    ids = case.inputs["input_ids"]
    return ids.masked_fill((ids == IMAGE) | (case.inputs["attention_mask"] == 0), -100)


# -- training -------------------------------------------------------------------------------------


def gradients(case: Case, **inputs: Any) -> dict[str, torch.Tensor]:
    targets = labels(case)
    # What comes after an image is predicted by its last token that is there, not by its last.
    targets[:, 1:][case.inputs["input_ids"][:, :-1] == IMAGE] = -100
    case.model.zero_grad()
    case.model(**case.batch() | inputs, labels=targets).loss.backward()
    parameters = case.model.named_parameters()
    return {name: p.grad.clone() for name, p in parameters if p.grad is not None}


def test_gradients_are_those_of_masking_what_was_dropped() -> None:
    case = llava("right")
    with tr.attach(case.model, REDUCER) as run:
        reduced = gradients(case)
        mask = case.inputs["attention_mask"].clone()
        for item in run.reductions:
            dropped = torch.ones(len(item.columns), dtype=torch.bool)
            dropped[item.kept] = False
            mask[item.prompt, item.columns[dropped]] = 0
    positions = torch.arange(mask.shape[1])[None]
    masked = gradients(case, attention_mask=mask, position_ids=positions)
    assert reduced.keys() == masked.keys()
    for name, gradient in masked.items():
        assert torch.allclose(reduced[name], gradient, atol=1e-5 + 1e-4 * gradient.abs().max()), (
            name
        )


@pytest.mark.parametrize("make", [llava, qwen2_5_vl, qwen3_vl])
def test_training_steps_lower_the_loss(make: Callable[[str], Case]) -> None:
    case = make("right")
    model = case.model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    with tr.attach(model, EveryOther(reduction=2)) as run:
        for _ in range(5):
            loss = model(**case.batch(), labels=labels(case)).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert run.receipt.tokens_out < run.receipt.tokens_in
    assert losses == sorted(losses, reverse=True)


# -- adapters -------------------------------------------------------------------------------------


def lora(**options: Any) -> peft.LoraConfig:
    return peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False, **options)


def adapted(case: Case, config: Any = None) -> Any:
    torch.manual_seed(0)
    return peft.get_peft_model(case.model, config or lora()).eval()


@PEFT_WARNS
def test_adapters_added_before_and_after_attaching_give_the_same() -> None:
    before, after = llava(), llava()
    plain = new_ids(before)
    wrapped = adapted(before)
    reduced_by_hand = reference.greedy(before, REDUCER, STEPS)[0]
    with tr.attach(wrapped, REDUCER) as run:
        assert run.model is before.model
        assert torch.equal(new_ids(before, wrapped), reduced_by_hand)
        assert run.receipt.tokens_out < 32
    with tr.attach(after.model, REDUCER) as run:
        unadapted = new_ids(after)
        wrapped = adapted(after)
        assert torch.equal(new_ids(after, wrapped), reduced_by_hand)
        with wrapped.disable_adapter():
            assert torch.equal(new_ids(after, wrapped), unadapted)
        with pytest.raises(AttachmentError, match="already"):
            tr.attach(wrapped, REDUCER)
    assert torch.equal(new_ids(after, wrapped.unload()), plain)


@PEFT_WARNS
def test_adapters_can_be_merged_and_unloaded_while_attached() -> None:
    case = llava()
    wrapped = adapted(case)
    expected = reference.greedy(case, REDUCER, STEPS)[0]
    with tr.attach(wrapped, REDUCER):
        wrapped.merge_adapter()
        assert torch.equal(new_ids(case, wrapped), expected)
        wrapped.unmerge_adapter()
        assert torch.equal(new_ids(case, wrapped), expected)
        merged = wrapped.merge_and_unload()
        assert merged is case.model
        assert torch.equal(new_ids(case), expected)


@PEFT_WARNS
def test_saving_while_attached_saves_what_is_saved_otherwise(tmp_path: Path) -> None:
    case = llava()
    wrapped = adapted(case)
    wrapped.save_pretrained(tmp_path / "adapter")
    case.model.save_pretrained(tmp_path / "model")
    with tr.attach(wrapped, REDUCER):
        wrapped.save_pretrained(tmp_path / "attached-adapter")
        case.model.save_pretrained(tmp_path / "attached-model")
    for kind in ("adapter", "model"):
        plain, attached = tmp_path / kind, tmp_path / f"attached-{kind}"
        names = sorted(path.name for path in plain.iterdir())
        assert names == sorted(path.name for path in attached.iterdir())
        [weights] = plain.glob("*.safetensors")
        for name, tensor in load_file(weights).items():
            assert torch.equal(load_file(attached / weights.name)[name], tensor)
        for path in plain.glob("*.json"):
            assert path.read_text() == (attached / path.name).read_text()


@dataclass(frozen=True, kw_only=True)
class Unrotated(tr.Scorer):
    """Keeps what is attended to before rotary positions."""

    @property
    def needs(self) -> tuple[str, ...]:
        return ("unrotated_attention",)

    def score(self, tokens: tr.VisualTokens) -> torch.Tensor:
        return tokens.signal("unrotated_attention")


def adapters_of(where: str) -> peft.LoraConfig:
    modules = rf".*{where}.*(q_proj|k_proj)"
    return peft.LoraConfig(target_modules=modules, init_lora_weights=False)


@PEFT_WARNS
def test_attention_of_the_encoder_is_read_with_its_adapters() -> None:
    kept = []
    for attach_first in (True, False):
        case = llava()
        if not attach_first:
            adapted(case, adapters_of("vision_tower"))
        with tr.attach(case.model, tr.create_strategy("fastervlm", keep=4)) as run:
            if attach_first:
                adapted(case, adapters_of("vision_tower"))
            logits(case)
            kept.append([item.kept.tolist() for item in run.reductions])
    assert kept[0] == kept[1]


@PEFT_WARNS
def test_adapters_on_a_projection_that_is_listened_to_come_before_attaching() -> None:
    case = llava()
    stage = tr.Stage(reducer=Unrotated(keep_ratio=0.5), site="decoder", layer=1)
    with tr.attach(case.model, stage):
        wrapped = adapted(case, adapters_of("language_model"))
        with pytest.raises(AttachmentError, match=r"_proj of .* was replaced"):
            logits(case, wrapped)
    with tr.attach(wrapped, stage) as run:
        logits(case, wrapped)
        assert run.receipt.tokens_out < run.receipt.tokens_in


@PEFT_WARNS
def test_an_adapter_is_trained_while_attached() -> None:
    case = llava("right")
    wrapped = adapted(case).train()
    with tr.attach(wrapped, REDUCER):
        wrapped(**case.batch(), labels=labels(case)).loss.backward()
    graded = {name for name, p in wrapped.named_parameters() if p.grad is not None}
    assert graded
    assert all("lora" in name for name in graded)


@PEFT_WARNS
@pytest.mark.parametrize("kind", [peft.PromptTuningConfig, peft.PrefixTuningConfig])
@pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning")
def test_learned_prompts_come_before_the_reduced_sequence(kind: Any) -> None:
    case = llava("right")
    wrapped = adapted(case, kind(task_type="CAUSAL_LM", num_virtual_tokens=3))
    with tr.attach(wrapped, REDUCER) as run:
        reduced = logits(case, wrapped)
        items = run.reductions
        assert new_ids(case, wrapped).shape == (2, STEPS)
    prompt = reduced.shape[1] - case.inputs["input_ids"].shape[1]
    mask = case.inputs["attention_mask"].clone()
    for item in items:
        dropped = torch.ones(len(item.columns), dtype=torch.bool)
        dropped[item.kept] = False
        mask[item.prompt, item.columns[dropped] - prompt] = 0
    masked = Case(case.model, {**case.inputs, "attention_mask": mask}, case.items)
    expected = logits(masked, wrapped)[:, prompt:]
    kept = mask.bool()
    assert (reduced[:, prompt:][kept] - expected[kept]).abs().max() < 1e-4


# -- devices --------------------------------------------------------------------------------------


def offloaded(model: Any, folder: Path, how: str) -> Any:
    if how == "cpu_offload":
        return accelerate.cpu_offload(model, execution_device="cpu")
    if how == "disk_offload":
        return accelerate.disk_offload(model, str(folder), execution_device="cpu")
    layers = {f"model.language_model.layers.{i}": "disk" if i % 2 else "cpu" for i in range(4)}
    device_map = {
        "model.vision_tower": "disk",
        "model.multi_modal_projector": "cpu",
        "model.language_model.embed_tokens": "cpu",
        "model.language_model.norm": "cpu",
        "model.language_model.rotary_emb": "cpu",
        "lm_head": "disk",
        **layers,
    }
    return accelerate.dispatch_model(
        model, device_map, main_device="cpu", offload_dir=str(folder), force_hooks=True
    )


@OFFLOADING_WARNS
@pytest.mark.parametrize("how", ["cpu_offload", "disk_offload", "device_map"])
@pytest.mark.parametrize("attach_first", [True, False])
def test_offloaded_models(how: str, attach_first: bool, tmp_path: Path) -> None:
    case = llava()
    expected = reference.greedy(case, REDUCER, STEPS)[0]
    plain = new_ids(case)
    if not attach_first:
        offloaded(case.model, tmp_path, how)
    run = tr.attach(case.model, REDUCER)
    if attach_first:
        offloaded(case.model, tmp_path, how)
    assert torch.equal(new_ids(case), expected)
    run.detach()
    assert torch.equal(new_ids(case), plain)


@OFFLOADING_WARNS
def test_offloading_can_end_while_attached() -> None:
    case = llava()
    expected = reference.greedy(case, REDUCER, STEPS)[0]
    offloaded(case.model, Path(), "cpu_offload")
    with tr.attach(case.model, REDUCER):
        assert torch.equal(new_ids(case), expected)
        remove_hook_from_submodules(case.model)
        assert torch.equal(new_ids(case), expected)


def test_a_model_may_change_its_type_while_attached() -> None:
    case = llava()
    with tr.attach(case.model, tr.create_strategy("divprune", keep=4)) as run:
        single = logits(case)
        case.model.to(torch.bfloat16)
        case.inputs["pixel_values"] = case.inputs["pixel_values"].bfloat16()
        half = logits(case)
        assert half.dtype == torch.bfloat16
        assert run.receipt.kv_bytes_per_token == 2 * 4 * 2 * 16 * 2
        case.model.float()
        case.inputs["pixel_values"] = case.inputs["pixel_values"].float()
        assert logits(case).dtype == single.dtype
        assert run.receipt.tokens_out == 8


def test_a_parallel_wrapper_is_attached_to_through_its_model() -> None:
    case = llava()
    expected = reference.greedy(case, REDUCER, STEPS)[1][0]
    parallel = torch.nn.DataParallel(case.model)
    with tr.attach(parallel, REDUCER) as run:
        assert run.model is case.model
        batch = case.batch()
        batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
        with torch.no_grad():
            out = parallel(**batch).logits[:, -1]
        assert (out - expected).abs().max() < 1e-5


def test_a_replica_is_refused() -> None:
    case = llava()
    with tr.attach(case.model, REDUCER):
        # One step of what DataParallel does for each of several devices.
        replica = case.model.model._replicate_for_data_parallel()
        with pytest.raises(AttachmentError, match="replica"):
            replica(**case.batch())


# -- copies ---------------------------------------------------------------------------------------


def test_a_model_is_copied_and_saved_once_detached() -> None:
    case = llava()
    with tr.attach(case.model, REDUCER) as run:
        expected = new_ids(case)
        for duplicate in (copy.deepcopy, lambda model: torch.save(model, io.BytesIO())):
            with pytest.raises(AttachmentError, match="copied or pickled"):
                duplicate(case.model)
        run.detach()
    twin = copy.deepcopy(case.model)
    with tr.attach(twin, REDUCER):
        assert torch.equal(new_ids(case, twin), expected)
        weights = io.BytesIO()
        torch.save(twin.state_dict(), weights)
    weights.seek(0)
    assert torch.load(weights).keys() == case.model.state_dict().keys()


def test_wrappers_of_other_models_are_refused_as_those_models_are() -> None:
    with pytest.raises(UnsupportedModel, match=r"Linear"):
        tr.attach(torch.nn.DataParallel(torch.nn.Linear(2, 2)), REDUCER)
