"""Vision encoders made smaller, and loaded again in shapes that no configuration can express."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

import tokenreduce as tr
from support.timm_llava import timm_config
from support.tiny_models import CASES, Case, lively, llava, qwen2_5_vl, qwen3_vl
from tokenreduce.backends import find_encoder_pruner
from tokenreduce.errors import (
    AttachmentError,
    MediaError,
    MissingSignal,
    PipelineError,
    UnsupportedModel,
)
from tokenreduce_integrations.pruning.encoders import find_encoder
from tokenreduce_integrations.pruning.planning import feature_layer
from tokenreduce_integrations.pruning.surgery import (
    PLAN_FILE,
    SurgeryPlan,
    cut_class,
    plan_of,
    restore_class,
)
from tokenreduce_integrations.pruning.timm_tower import adapt_timm_tower
from tokenreduce_integrations.testbed.models import load

CUTS: dict[str, dict[str, Any]] = {
    "mlp": {"mlp_ratio": 0.3},
    "heads": {"head_ratio": 0.5},
    "depth": {"depth_ratio": 0.4},
    "everything": {"mlp_ratio": 0.3, "head_ratio": 0.4, "depth_ratio": 0.3, "scope": "encoder"},
}


def prune(model: Any, backend: str = "structured", processor: Any = None, **options: Any) -> Any:
    pruner = find_encoder_pruner(backend)
    pruner.check(model, options)
    pruner.prune(model, options, processor)
    return plan_of(model)


def logits(model: Any, case: Case) -> Tensor:
    with torch.no_grad():
        return model(**case.batch()).logits


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def saved_and_loaded(model: Any, folder: Path) -> Any:
    model.save_pretrained(folder)
    plan_of(model).save(folder)
    plan = SurgeryPlan.read(folder / PLAN_FILE)
    again = cut_class(type(model), plan).from_pretrained(folder)
    restore_class(again, type(model))
    adapt_timm_tower(again)
    return again.eval()


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("name", CASES)
def test_pruned_models_run_reduce_and_load_again(name: str, cut: str, tmp_path: Path) -> None:
    case = CASES[name]()
    model = case.model
    before, whole = parameters(model), logits(model, case)
    prune(model, **CUTS[cut])
    assert parameters(model) < before
    pruned = logits(model, case)
    assert pruned.shape == whole.shape
    again = saved_and_loaded(model, tmp_path)
    assert type(again) is type(model)
    assert torch.equal(logits(again, case), pruned)
    with tr.attach(model, tr.create_strategy("lftr", reduction=2)) as run:
        reduced = logits(model, case)
        assert run.receipt.tokens_out < run.receipt.tokens_in
    assert not torch.equal(reduced, pruned)
    assert torch.equal(logits(model, case), pruned)


def test_pruning_by_zeroed_channels_changes_nothing() -> None:
    """What has no weight is what leaves, and its leaving cannot be seen."""
    case = llava()
    tower = find_encoder(case.model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for block in tower.module.encoder.layers:
            dead = torch.randperm(48, generator=generator)[:16]
            block.mlp.fc1.weight[dead] = 0
            block.mlp.fc1.bias[dead] = 0
            block.mlp.fc2.weight[:, dead] = 0
            for name in ("q_proj", "k_proj", "v_proj"):
                getattr(block.self_attn, name).weight[8:16] = 0
                getattr(block.self_attn, name).bias[8:16] = 0
            block.self_attn.out_proj.weight[:, 8:16] = 0
    whole = logits(case.model, case)
    plan = prune(case.model, mlp_ratio=1 / 3, head_ratio=0.25)
    assert plan.slices["encoder.layers.0.self_attn.q_proj"].rows == (*range(8), *range(16, 32))
    torch.testing.assert_close(logits(case.model, case), whole, rtol=1e-4, atol=1e-4)


def test_the_last_block_of_clip_leaves_unseen() -> None:
    """LLaVA reads the second to last hidden state, so the last block computes nothing."""
    case = llava()
    whole = logits(case.model, case)
    prune(case.model, depth_ratio=0.34)
    assert torch.equal(logits(case.model, case), whole)
    assert case.model.config.vision_feature_layer == -1
    assert case.model.config.vision_config.num_hidden_layers == 2


def test_a_plainly_shaped_model_loads_without_its_plan(tmp_path: Path) -> None:
    case = llava()
    prune(case.model, mlp_ratio=0.3, depth_ratio=0.34)
    case.model.save_pretrained(tmp_path)
    plain = type(case.model).from_pretrained(tmp_path).eval()
    assert torch.equal(logits(plain, case), logits(case.model, case))


@pytest.mark.parametrize(
    ("index", "kept", "moved"),
    [
        (-2, (0, 1), -1),
        (-2, (0, 2), -2),
        (-1, (0, 2), -1),
        (2, (0, 1), 2),
        (2, (1, 2), 1),
        (0, (1, 2), 0),
        (-3, (1, 2), -3),
    ],
)
def test_feature_layers_move_with_the_blocks(index: int, kept: tuple[int, ...], moved: int) -> None:
    """Of three blocks; hidden state i leaves the i-th block."""
    assert feature_layer(index, 3, kept) == moved


def test_blocks_that_the_llm_reads_stay() -> None:
    case = qwen3_vl()
    plan = prune(case.model, depth_ratio=0.3)
    assert plan.kept == (0, 1)
    with pytest.raises(PipelineError, match="read by the LLM on the side"):
        prune(qwen3_vl().model, depth_ratio=0.6)


def test_blocks_with_full_attention_keep_it() -> None:
    case = qwen2_5_vl()
    plan = prune(case.model, depth_ratio=0.34)
    assert case.model.model.visual.fullatt_block_indexes == [
        i for i, block in enumerate(plan.kept) if block == 1
    ]


def test_ranked_together_blocks_get_different_widths() -> None:
    case = llava()
    with torch.no_grad():
        case.model.model.vision_tower.encoder.layers[1].mlp.fc1.weight[:12] *= 10
    prune(case.model, mlp_ratio=0.5, scope="encoder", multiple_of=4)
    widths = [layer.mlp.fc1.out_features for layer in case.model.model.vision_tower.encoder.layers]
    assert len(set(widths)) > 1
    assert all(width % 4 == 0 for width in widths)


def test_signals_of_pruned_heads(tmp_path: Path) -> None:
    """Class attention of the heads that are left, against attention computed by the model."""
    case = llava()
    prune(case.model, head_ratio=0.5)
    tower = case.model.model.vision_tower
    eager = copy.deepcopy(case.model)
    eager.set_attn_implementation({"vision_config": "eager"})
    pixels = case.inputs["pixel_values"]
    with torch.no_grad():
        seen = eager.model.vision_tower(pixels, output_attentions=True).attentions[-2]
    expected = seen.mean(1)[:, 0, 1:].topk(4).indices.sort().values
    assert tower.encoder.layers[0].self_attn.num_heads == 2
    with tr.attach(case.model, tr.create_strategy("fastervlm", keep=4)) as run:
        logits(case.model, case)
        kept = torch.stack([item.kept for item in run.reductions])
    assert torch.equal(kept, expected)


# -- importance ------------------------------------------------------------------------------------


def pictures(folder: Path) -> Path:
    folder.mkdir()
    for i in range(3):
        Image.effect_noise((96, 96), 40 + 20 * i).convert("RGB").save(folder / f"{i}.png")
    (folder / "notes.txt").write_text("not a picture")
    return folder


def test_calibration_keeps_the_channels_that_act(tmp_path: Path) -> None:
    model, processor = load("b")
    layer = model.model.vision_tower.encoder.layers[0].mlp
    reads: list[Tensor] = []
    handle = layer.fc2.register_forward_pre_hook(lambda _, args: reads.append(args[0].detach()))
    folder = pictures(tmp_path / "pictures")
    images = [Image.open(path).convert("RGB") for path in sorted(folder.glob("*.png"))]
    pixels = processor.image_processor(images, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        model.get_image_features(pixels)
    handle.remove()
    energy = reads[0].square().flatten(0, 1).sum(0) * layer.fc2.weight.detach().square().sum(0)
    width = len(energy)
    best = tuple(energy.topk(width // 2).indices.sort().values.tolist())
    plan = prune(model, processor=processor, mlp_ratio=0.5, calibration=str(folder))
    assert plan.slices["encoder.layers.0.mlp.fc2"].columns == best


def test_calibration_drops_the_block_that_does_least(tmp_path: Path) -> None:
    model, processor = load("b")
    quiet = model.model.vision_tower.encoder.layers[1]
    with torch.no_grad():
        quiet.self_attn.out_proj.weight *= 1e-3
        quiet.mlp.fc2.weight *= 1e-3
    folder = str(pictures(tmp_path / "pictures"))
    # The last of the five blocks is never read and leaves first.
    plan = prune(model, processor=processor, depth_ratio=0.4, calibration=folder)
    assert plan.kept == (0, 2, 3)


def test_calibration_needs_pictures(tmp_path: Path) -> None:
    model, processor = load("b")
    with pytest.raises(MediaError, match="no such folder"):
        prune(model, processor=processor, mlp_ratio=0.5, calibration=str(tmp_path / "none"))
    with pytest.raises(MediaError, match="holds no pictures"):
        prune(model, processor=processor, mlp_ratio=0.5, calibration=str(tmp_path))


# -- timm ------------------------------------------------------------------------------------------


def timm_case() -> tuple[Any, dict[str, Tensor]]:
    model = lively(transformers.LlavaForConditionalGeneration(timm_config()))
    _, processor = load("b")
    text = "<image> " * 144 + "USER: what digit is shown ? ASSISTANT:"
    generator = torch.Generator().manual_seed(0)
    return model, {
        "input_ids": torch.tensor([processor.tokenizer(text)["input_ids"]]),
        "pixel_values": torch.randn(1, 3, 96, 96, generator=generator),
    }


def test_timm_towers_hand_sequences_on() -> None:
    """What a LLaVA reads of a timm tower is what the bare timm model computes."""
    model, inputs = timm_case()
    with pytest.raises((RuntimeError, ValueError)):
        model(**inputs)
    assert adapt_timm_tower(model)
    assert adapt_timm_tower(model)
    tower = model.model.vision_tower
    with torch.no_grad():
        expected = tower.timm_model.forward_intermediates(
            inputs["pixel_values"], indices=[2], output_fmt="NLC", intermediates_only=True
        )[0]
        features = model.get_image_features(inputs["pixel_values"]).pooler_output[0]
        assert torch.equal(features, model.model.multi_modal_projector(expected)[0])
    assert len(tower._forward_hooks) == 1


def test_timm_towers_count_blocks_from_their_first_output() -> None:
    """Their hidden states begin after the first block, those of CLIP before it."""
    config = timm_config(vision_feature_layer=1)
    model = lively(transformers.LlavaForConditionalGeneration(config))
    adapt_timm_tower(model)
    _, inputs = timm_case()
    with torch.no_grad():
        whole = model(**inputs).logits
    plan = prune(model, depth_ratio=0.34)
    assert plan.kept == (0, 1)
    assert model.config.vision_feature_layer == 1
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, whole)


def test_timm_towers_have_no_class_token_to_drop() -> None:
    config = timm_config(vision_feature_select_strategy="default")
    model = transformers.LlavaForConditionalGeneration(config)
    with pytest.raises(UnsupportedModel, match="the first patch would be dropped"):
        adapt_timm_tower(model)
    assert not adapt_timm_tower(llava().model)


@pytest.mark.parametrize("layer", [-1, 1])
def test_signals_of_pruned_timm_towers(layer: int) -> None:
    """Class attention, in the block whose output the projector reads, from the weights by hand."""
    model, inputs = timm_case()
    model.config.vision_feature_layer = layer
    adapt_timm_tower(model)
    prune(model, head_ratio=0.5)
    attention = model.model.vision_tower.timm_model.blocks[layer].attn
    seen: list[Tensor] = []
    handle = attention.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with tr.attach(model, tr.create_strategy("fastervlm", keep=9)) as run, torch.no_grad():
        model(**inputs)
        [found] = run.reductions
    handle.remove()
    assert attention.num_heads == 2
    with torch.no_grad():
        query, key, _ = attention.qkv(seen[0]).unflatten(-1, (3, 2, 12)).unbind(2)
        scores = torch.einsum("bhd,bshd->bhs", query[:, 0], key) / 12**0.5
    expected = scores.softmax(-1).mean(1)[:, 1:].topk(9).indices.sort().values
    assert torch.equal(found.kept, expected[0])
    assert not attention.q_norm._forward_hooks
    assert not attention.k_norm._forward_hooks


def test_timm_towers_without_a_class_token_give_no_class_attention() -> None:
    bare = timm_config()
    bare.vision_config.model_args.update(class_token=False, global_pool="avg")
    model = lively(transformers.LlavaForConditionalGeneration(bare))
    adapt_timm_tower(model)
    with pytest.raises(MissingSignal, match="class_attention"):
        tr.attach(model, tr.create_strategy("fastervlm", keep=9))


@pytest.mark.parametrize("cut", CUTS)
def test_pruned_timm_towers(cut: str, tmp_path: Path) -> None:
    model, inputs = timm_case()
    adapt_timm_tower(model)
    before = parameters(model)
    prune(model, **CUTS[cut])
    assert parameters(model) < before
    again = saved_and_loaded(model, tmp_path)
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, again(**inputs).logits)


# -- torch-pruning ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llava", "onevision", "internvl"])
@pytest.mark.parametrize("importance", ["magnitude", "lamp", "fpgm"])
def test_torch_pruning_narrows_mlps_alone(name: str, importance: str, tmp_path: Path) -> None:
    pytest.importorskip("torch_pruning", reason="needs the extra vision")
    case = CASES[name]()
    plan = prune(case.model, "torch_pruning", mlp_ratio=0.5, importance=importance)
    blocks = find_encoder(case.model).blocks
    assert [block.mlp.channels for block in blocks] == [24] * len(blocks)
    assert {path.rpartition(".")[2] for path in plan.slices} == {"fc1", "fc2"}
    assert not any(p.requires_grad is False for p in case.model.parameters())
    pruned = logits(case.model, case)
    assert torch.equal(logits(saved_and_loaded(case.model, tmp_path), case), pruned)


def test_torch_pruning_of_a_timm_tower(tmp_path: Path) -> None:
    pytest.importorskip("torch_pruning", reason="needs the extra vision")
    model, inputs = timm_case()
    adapt_timm_tower(model)
    prune(model, "torch_pruning", mlp_ratio=0.5)
    with torch.no_grad():
        assert model(**inputs).logits.isfinite().all()
    assert model.model.vision_tower.timm_model.blocks[0].mlp.fc1.out_features == 96


def test_torch_pruning_refuses_what_it_cannot_trace() -> None:
    pytest.importorskip("torch_pruning", reason="needs the extra vision")
    with pytest.raises(UnsupportedModel, match=r"takes no pictures of a fixed size.*structured"):
        prune(qwen2_5_vl().model, "torch_pruning", mlp_ratio=0.5)


# -- checkpoints -----------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "model.vision_tower."])
def test_a_tower_that_was_pruned_elsewhere(prefix: str, tmp_path: Path) -> None:
    case = llava()
    elsewhere = copy.deepcopy(case.model)
    prune(elsewhere, mlp_ratio=0.3, head_ratio=0.5, depth_ratio=0.34)
    state = elsewhere.model.vision_tower.state_dict()
    file = tmp_path / "tower.safetensors"
    save_file({prefix + name: value.contiguous() for name, value in state.items()}, file)
    prune(case.model, "checkpoint", weights=str(file))
    assert torch.equal(logits(case.model, case), logits(elsewhere, case))
    again = saved_and_loaded(case.model, tmp_path / "saved")
    assert torch.equal(logits(again, case), logits(elsewhere, case))


def test_a_bare_timm_checkpoint(tmp_path: Path) -> None:
    """Without the names of the wrapper that holds the tower in a model."""
    model, inputs = timm_case()
    adapt_timm_tower(model)
    elsewhere = copy.deepcopy(model)
    prune(elsewhere, mlp_ratio=0.3, head_ratio=0.5)
    state = elsewhere.model.vision_tower.timm_model.state_dict()
    save_file(state, tmp_path / "vit.safetensors")
    prune(model, "checkpoint", weights=str(tmp_path / "vit.safetensors"))
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, elsewhere(**inputs).logits)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({"something.else": (2, 2)}, "holds no encoder.layers.0"),
        ({"encoder.layers.1.mlp.fc2.weight": (32, 48)}, "Number them from 0 without gaps"),
        ({"encoder.layers.0.mlp.fc2.weight": (32, 48)}, r"self_attn.out_proj.weight has .* None"),
        (
            {
                "encoder.layers.0.mlp.fc2.weight": (32, 48),
                "encoder.layers.0.self_attn.out_proj.weight": (32, 12),
            },
            "whole groups of 8",
        ),
    ],
)
def test_checkpoints_that_do_not_fit(
    names: dict[str, tuple[int, int]], message: str, tmp_path: Path
) -> None:
    file = tmp_path / "tower.safetensors"
    save_file({name: torch.zeros(shape) for name, shape in names.items()}, file)
    with pytest.raises(UnsupportedModel, match=message):
        prune(llava().model, "checkpoint", weights=str(file))


def test_a_checkpoint_that_is_not_there() -> None:
    with pytest.raises(PipelineError, match="cannot be read"):
        prune(llava().model, "checkpoint", weights="/no/such.safetensors")


# -- refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("backend", "options", "message"),
    [
        ("structured", {}, "nothing to remove"),
        ("structured", {"mlp_ration": 0.3}, "Did you mean 'mlp_ratio'"),
        ("structured", {"mlp_ratio": 1.0}, "at least 0 and less than 1"),
        ("structured", {"mlp_ratio": True}, "at least 0 and less than 1"),
        ("structured", {"mlp_ratio": 0.3, "scope": "blocks"}, "Did you mean 'block'"),
        ("structured", {"mlp_ratio": 0.3, "multiple_of": 0}, "whole number from 1 on"),
        ("structured", {"mlp_ratio": 0.3, "calibration": ""}, "must be a path"),
        ("torch_pruning", {"head_ratio": 0.5}, "unknown option"),
        ("torch_pruning", {}, "nothing to remove"),
        ("torch_pruning", {"mlp_ratio": 0.3, "importance": "luck"}, "magnitude"),
        ("checkpoint", {}, "must be a path"),
    ],
)
def test_wrong_options(backend: str, options: dict[str, Any], message: str) -> None:
    if backend == "torch_pruning":
        pytest.importorskip("torch_pruning", reason="needs the extra vision")
    with pytest.raises(PipelineError, match=message):
        prune(llava().model, backend, **options)


def test_attached_models_are_not_pruned() -> None:
    case = llava()
    with (
        tr.attach(case.model, tr.create_strategy("uniform", keep=4)),
        pytest.raises(AttachmentError, match="detach it, prune"),
    ):
        prune(case.model, mlp_ratio=0.3)


def test_unknown_forms_are_refused_part_by_part() -> None:
    case = llava()
    for layer in case.model.model.vision_tower.encoder.layers:
        layer.self_attn.sink = nn.Parameter(torch.zeros(5))
    with pytest.raises(UnsupportedModel, match=r"heads of model\.vision_tower cannot be pruned"):
        prune(case.model, head_ratio=0.5)
    prune(case.model, mlp_ratio=0.3)


@pytest.mark.parametrize("text", ["{", "[]", '{"format": 1}', '{"format": 99}'])
def test_damaged_plans(text: str, tmp_path: Path) -> None:
    (tmp_path / PLAN_FILE).write_text(text)
    with pytest.raises(PipelineError, match=r"surgery plan|later version"):
        SurgeryPlan.read(tmp_path / PLAN_FILE)


def test_a_plan_of_another_model(tmp_path: Path) -> None:
    plan = prune(llava().model, head_ratio=0.5, depth_ratio=0.34)
    with pytest.raises(UnsupportedModel, match="does not fit"):
        plan.apply(qwen3_vl().model)
    plan.save(tmp_path)
    document = json.loads((tmp_path / PLAN_FILE).read_text())
    document["kept"] = [7]
    (tmp_path / PLAN_FILE).write_text(json.dumps(document))
    wrong = SurgeryPlan.read(tmp_path / PLAN_FILE)
    with pytest.raises(UnsupportedModel, match="does not fit"):
        wrong.apply(llava().model)
