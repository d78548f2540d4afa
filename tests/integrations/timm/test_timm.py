"""Stages inside timm's transformers against the unmodified model and a recomputation."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import timm
import torch
import transformers
from torch import Tensor

import tokenreduce as tr
from support.reducers import EveryOther, LargestNorm, MatchesKeys, UnevenRandom
from support.tiny_models import noise
from support.tower_reference import Sequence, attend, heads, left_after
from tokenreduce.errors import (
    AttachmentError,
    MissingSignal,
    ReductionError,
    UnsupportedModel,
    UnsupportedSite,
)

SIZES = {"embed_dim": 32, "depth": 4, "num_heads": 4, "num_classes": 5}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("vit_tiny_patch16_224", {}),
    "vit-layer-scale": ("vit_tiny_patch16_224", {"init_values": 0.5, "qk_norm": True}),
    "vit-gap": ("vit_tiny_patch16_224", {"global_pool": "avg", "class_token": False}),
    "vit-registers": ("vit_tiny_patch16_224", {"reg_tokens": 3, "global_pool": "avgmax"}),
    "vit-map": ("vit_tiny_patch16_224", {"global_pool": "map", "class_token": False}),
    "eva": ("eva02_tiny_patch14_224", {"patch_size": 16}),
    "eva-post-norm": ("eva02_tiny_patch14_224", {"patch_size": 16, "use_post_norm": True}),
    "rope-mixed": ("vit_small_patch16_rope_mixed_224", {}),
    "naflex": ("naflexvit_base_patch16_gap", {}),
    "naflex-map": ("naflexvit_base_patch16_map", {}),
    "naflex-rope": ("naflexvit_base_patch16_gap", {"rope_type": "axial"}),
}


def build(name: str, **options: Any) -> Any:
    """A tiny model whose every token matters."""
    architecture, extra = MODELS[name]
    size = {} if name.startswith("naflex") else {"img_size": 64}
    model = timm.create_model(architecture, **{**SIZES, **size, **extra, **options}).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if float(parameter.detach().abs().max()) < 1e-4:
                parameter.fill_(0.5)  # layer scale, which begins near zero
            if parameter.ndim >= 2:
                sample = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(sample / parameter[0].numel() ** 0.5)
    return model


def images(batch: int = 3) -> Tensor:
    return noise(batch, 3, 64, 64)


def inside(reducer: tr.Reducer, **options: Any) -> tr.Stage:
    return tr.Stage(reducer=reducer, site="vision", **options)


def trace(model: Any) -> list[Any]:
    return [(sorted(vars(m)), [*m._forward_hooks, *m._forward_pre_hooks]) for m in model.modules()]


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_keep_all_is_bit_identical_and_detach_exact(name: str) -> None:
    model, x = build(name), images()
    before, state = model(x), trace(model)
    with tr.attach(model, inside(MatchesKeys(keep_ratio=1.0))) as run:
        assert torch.equal(model(x), before)
        assert run.receipt.ratio == 1.0
        assert "within the budget" in run.receipt.reason
    with tr.attach(model, inside(MatchesKeys(keep=6))) as run:
        assert not torch.allclose(model(x), before, atol=1e-3)
        with pytest.raises(AttachmentError, match="copied"):
            copy.deepcopy(model)
        with pytest.raises(AttachmentError, match="already"):
            tr.attach(model, inside(MatchesKeys(keep=6)))
    assert trace(model) == state
    assert torch.equal(model(x), before)


def rotate(x: Tensor, rope: Tensor, half: bool) -> Tensor:
    """Rotary embeddings of ``(n, H, d)`` by ``(n, [H,] 2 d)``: sines, then cosines."""
    sin, cos = rope.chunk(2, -1)
    if sin.ndim == 2:
        sin, cos = sin[:, None], cos[:, None]
    if half:
        first, second = x.chunk(2, -1)
        turned = torch.cat([-second, first], -1)
    else:
        turned = torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)
    return x * cos + turned * sin


def run_block(block: Any, sequence: Sequence, rope: Tensor | None) -> Tensor:
    """One block in paper notation; ``rope`` ``([H,] N, 2 d)``. Returns keys before rotation."""
    attention, x = block.attn, sequence.tokens
    post_norm = type(block).__name__ == "EvaBlockPostNorm"
    h = x if post_norm else block.norm1(x)
    if attention.qkv is not None and getattr(attention, "q_bias", None) is not None:
        bias = torch.cat([attention.q_bias, attention.k_bias, attention.v_bias])
        q, k, v = heads(h @ attention.qkv.weight.T + bias, 3 * attention.num_heads).chunk(3, 1)
    elif attention.qkv is not None:
        q, k, v = heads(attention.qkv(h), 3 * attention.num_heads).chunk(3, 1)
    else:
        q, k, v = (heads(getattr(attention, f"{n}_proj")(h), attention.num_heads) for n in "qkv")
    q, k = attention.q_norm(q), attention.k_norm(k)
    keys = k
    if rope is not None:
        count, half = len(sequence.prefix), bool(getattr(attention, "rotate_half", False))
        rows = rope[..., sequence.places, :]
        rows = rows.transpose(0, 1) if rows.ndim == 3 else rows
        q, k = (torch.cat([t[:count], rotate(t[count:], rows, half)]) for t in (q, k))
    mixed = attend(q, k, v, attention.scale, sequence.log_sizes)
    mixed = attention.proj(attention.norm(mixed))
    if post_norm:
        x = x + block.norm1(mixed)
        sequence.update(x + block.norm2(block.mlp(x)))
    elif hasattr(block, "gamma_1"):
        x = x + (mixed if block.gamma_1 is None else block.gamma_1 * mixed)
        mlp = block.mlp(block.norm2(x))
        sequence.update(x + (mlp if block.gamma_2 is None else block.gamma_2 * mlp))
    else:
        x = x + block.ls1(mixed)
        sequence.update(x + block.ls2(block.mlp(block.norm2(x))))
    return keys


def recompute(model: Any, tokens: Tensor, rope: Any, reducer: tr.Reducer, keep: int) -> Tensor:
    """``(S, D)`` output of the blocks for one image, each token showing what it flowed into."""
    prefix = model.num_prefix_tokens
    side = int((len(tokens) - prefix) ** 0.5)
    sequence = Sequence(tokens[:prefix], tokens[prefix:, None], grid=(side, side))
    count, depth = side * side, len(model.blocks)
    for number, block in enumerate(model.blocks, start=1):
        mixed = isinstance(rope, list) or (torch.is_tensor(rope) and rope.ndim == 4)
        keys = run_block(block, sequence, rope[number - 1] if mixed else rope)
        sequence.cut(reducer, left_after(count, keep, number, depth), keys.mean(1))
    full = torch.zeros_like(tokens)
    full[:prefix] = sequence.prefix
    for group, unit in zip(sequence.groups, sequence.units, strict=True):
        full[[prefix + i for i in group]] = unit
    return full


def embed(model: Any, x: Tensor) -> tuple[Tensor, Any]:
    """What the blocks of the unmodified model are given."""
    if hasattr(model, "_forward_embeds"):
        embeds = model._forward_embeds(x, None, None, None)
        return embeds["patches"], embeds["rope_embeds"]
    embedded = model._pos_embed(model.patch_embed(x))
    embedded, rope = embedded if isinstance(embedded, tuple) else (embedded, None)
    return model.norm_pre(embedded), rope


@pytest.mark.parametrize("reducer", [MatchesKeys(), LargestNorm()], ids=["merges", "drops"])
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_features_and_logits_equal_a_recomputation(name: str, reducer: tr.Reducer) -> None:
    model, x = build(name), images()
    tokens, rope = embed(model, x)
    expected = model.norm(
        torch.stack([recompute(model, row, rope, reducer, keep=6) for row in tokens])
    )
    stage = inside(reducer.with_budget(keep=6))
    pools = model.global_pool not in ("token", "") or model.attn_pool is not None
    if isinstance(reducer, LargestNorm) and pools:
        with pytest.raises(UnsupportedSite, match="pools"):
            tr.attach(model, stage)
        return
    with tr.attach(model, stage) as run:
        assert (model.forward_features(x) - expected).abs().max() < 2e-5
        logits = model(x)
        assert (logits - model.forward_head(expected)).abs().max() < 2e-5
        assert not torch.allclose(logits, build(name)(x), atol=1e-3)
        assert [i.tokens_out for i in run.receipt.items] == [6 + model.num_prefix_tokens] * 3


@pytest.mark.parametrize("name", ["vit", "eva", "naflex-rope"])
@torch.no_grad()
def test_intermediates_keep_their_shape(name: str) -> None:
    model, x = build(name), images()
    stock = model.forward_intermediates(x, indices=[0, 1, 3], norm=True)
    with tr.attach(model, inside(MatchesKeys(keep=6))):
        final, maps = model.forward_intermediates(x, indices=[0, 1, 3], norm=True)
        assert torch.equal(final, model.forward_features(x))
    assert [m.shape for m in maps] == [m.shape for m in stock[1]]
    counts = [len(m[0].flatten(1).T.unique(dim=0)) for m in maps]
    assert counts == [left_after(16, 6, n, 4) for n in (1, 2, 4)]


def naflex_batch(model: Any) -> dict[str, Tensor]:
    """Images of 4 x 4 and 2 x 5 patches, padded to 16."""
    grids = [(4, 4), (2, 5)]
    valid = torch.zeros(2, 16, dtype=torch.bool)
    coords = torch.zeros(2, 16, 2, dtype=torch.long)
    for row, (h, w) in enumerate(grids):
        valid[row, : h * w] = True
        coords[row, : h * w] = torch.cartesian_prod(torch.arange(h), torch.arange(w))
    return {"patches": noise(2, 16, 16 * 16 * 3), "patch_coord": coords, "patch_valid": valid}


@pytest.mark.parametrize("name", ["naflex", "naflex-map", "naflex-rope"])
@torch.no_grad()
def test_naflex_batches_of_unequal_images(name: str) -> None:
    model = build(name)
    batch = naflex_batch(model)
    before = model(batch)
    with tr.attach(model, inside(MatchesKeys(keep_ratio=1.0))):
        assert torch.equal(model(batch), before)
    with tr.attach(model, inside(MatchesKeys(keep_ratio=0.5))) as run:
        together = model(batch)
        done = [i.stages[0] for i in run.receipt.items]
        assert [d.tokens_out - d.protected for d in done] == [8, 5]
        for row, count in enumerate((16, 10)):
            alone = {k: v[row : row + 1, :count] for k, v in batch.items()}
            assert (model(alone)[0] - together[row]).abs().max() < 2e-5
    assert not torch.allclose(together, before, atol=1e-3)


@torch.no_grad()
def test_transformers_wrapper() -> None:
    config = transformers.TimmWrapperConfig(
        architecture="vit_tiny_patch16_224",
        model_args={**SIZES, "img_size": 64, "num_classes": 5},
    )
    config.model_args.pop("num_classes")
    model = transformers.TimmWrapperModel(config).eval()
    x = images()
    before = model(x).last_hidden_state
    with tr.attach(model, inside(MatchesKeys(keep=6))) as run:
        out = model(x, output_hidden_states=True)
        assert out.last_hidden_state.shape == before.shape
        assert len(out.last_hidden_state[0, 1:].unique(dim=0)) == 6
        assert run.receipt.tokens_out == 3 * 7
    assert torch.equal(model(x).last_hidden_state, before)


@torch.no_grad()
def test_receipt_reductions_disabled_and_budget() -> None:
    model, x = build("vit"), images()
    before = model(x)
    with tr.attach(model, inside(MatchesKeys(keep=8))) as run:
        with run.disabled():
            assert torch.equal(model(x), before)
            assert "disabled" in run.receipt.reason
        with run.budget(keep=12):
            model(x)
            assert run.receipt.tokens_out == 3 * 13
        model(x)
        assert run.receipt.items[0].stages[0].protected == 1
        assert "LLM" not in str(run.receipt)
        [first, *_] = run.reductions
        features = model.forward_features(x)[0]
        assert torch.equal(features, features[first.kept[first.assignment]])
        assert first.reduction is not None
        assert first.reduction.group_sizes().sum() == 17


@torch.no_grad()
def test_adaptive_strategies_and_threads() -> None:
    model, x = build("vit"), images(6)
    with tr.attach(model, inside(UnevenRandom(), schedule=None, layer=2)) as run:
        expected = model(x)
        assert len({i.tokens_out for i in run.receipt.items}) > 1
        for row in range(6):
            assert (model(x[row : row + 1])[0] - expected[row]).abs().max() < 1e-5

        def ask(_: int) -> Tensor:
            with torch.no_grad():
                return model(x)

        with ThreadPoolExecutor(4) as pool:
            results = list(pool.map(ask, range(8)))
    assert all(torch.equal(result, expected) for result in results)


def test_gradients_flow_and_checkpointing_is_refused() -> None:
    model, x = build("vit").train(), images()
    with tr.attach(model, inside(MatchesKeys(keep=6))):
        model(x).sum().backward()
        assert model.patch_embed.proj.weight.grad.abs().max() > 0
        model.set_grad_checkpointing(True)
        with pytest.raises(UnsupportedModel, match="checkpointing"):
            model(x)


@torch.no_grad()
def test_class_attention_is_that_of_the_block() -> None:
    seen: list[Tensor] = []

    class Reads(MatchesKeys):
        @property
        def needs(self) -> tuple[str, ...]:
            return ("class_attention",)

        def assign(self, tokens: tr.VisualTokens, k: int) -> Any:
            seen.append(tokens.signal("class_attention"))
            return super().assign(tokens, k)

    model, x = build("vit"), images()
    with tr.attach(model, inside(Reads(keep=8), layer=1)):
        model(x)
    block = model.blocks[0]
    h = block.norm1(embed(model, x)[0])
    q, k, _ = block.attn.qkv(h).reshape(3, 17, 3, 4, 8).permute(2, 0, 3, 1, 4)
    rows = (q[:, :, :1] @ k.transpose(2, 3) * block.attn.scale).softmax(-1).mean(1)[:, 0, 1:]
    assert (seen[0] - rows).abs().max() < 1e-6
    for name in ("vit-gap", "eva"):
        with pytest.raises(MissingSignal, match="class_attention"):
            tr.attach(build(name), inside(Reads(keep=8)))


@torch.no_grad()
def test_what_cannot_work_is_refused() -> None:
    model = build("vit")
    with pytest.raises(UnsupportedSite, match="encoder alone"):
        tr.attach(model, MatchesKeys(keep=6))
    for extra, named in (
        ({"block_fn": timm.models.vision_transformer.ParallelScalingBlock}, "ParallelScalingBlock"),
        ({"attn_layer": "diff"}, "DiffAttention"),
    ):
        with pytest.raises(UnsupportedModel, match=named):
            tr.attach(build("vit", **extra), inside(MatchesKeys(keep=6)))
    pooled = build("vit-gap")
    with (
        tr.attach(pooled, inside(EveryOther(keep=6))),
        pytest.raises(ReductionError, match="zeros"),
    ):
        pooled(images())


TOWERS = {
    "clip": lambda: transformers.CLIPVisionModelWithProjection(
        transformers.CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            image_size=64,
            patch_size=16,
            projection_dim=8,
        )
    ),
    "siglip": lambda: transformers.SiglipVisionModel(
        transformers.SiglipVisionConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            image_size=64,
            patch_size=16,
        )
    ),
    "dinov2": lambda: transformers.Dinov2ForImageClassification(
        transformers.Dinov2Config(
            hidden_size=32,
            num_hidden_layers=3,
            num_attention_heads=4,
            image_size=64,
            patch_size=16,
            num_labels=3,
            layerscale_value=0.5,
        )
    ),
    "dinov2-registers": lambda: transformers.Dinov2WithRegistersModel(
        transformers.Dinov2WithRegistersConfig(
            hidden_size=32,
            num_hidden_layers=3,
            num_attention_heads=4,
            image_size=64,
            patch_size=16,
            num_register_tokens=2,
        )
    ),
    "internvit": lambda: transformers.InternVLVisionModel(
        transformers.InternVLVisionConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            image_size=[64, 64],
            patch_size=[16, 16],
        )
    ),
}


@pytest.mark.parametrize("name", TOWERS)
@torch.no_grad()
def test_towers_of_transformers_alone(name: str) -> None:
    model, x = TOWERS[name]().eval(), images()
    model(x, output_hidden_states=True)  # transformers then leaves hooks of its own
    before, state = model(x), trace(model)
    with tr.attach(model, inside(MatchesKeys(keep_ratio=1.0))):
        for key, value in model(x).items():
            assert torch.equal(value, before[key])
    with tr.attach(model, inside(MatchesKeys(keep=6))) as run:
        after = model(x)
        assert {k: v.shape for k, v in after.items()} == {k: v.shape for k, v in before.items()}
        states = model(x, output_hidden_states=True).hidden_states
        prefix = run.receipt.items[0].stages[0].protected
        distinct = [len(h[0, prefix:].unique(dim=0)) for h in states]
        assert distinct == [16, 13, 10, 6]
    assert trace(model) == state
    assert all(torch.equal(value, before[key]) for key, value in model(x).items())
