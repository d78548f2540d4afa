"""Image strategies equal the authors' code on recorded cases. A missing case fails."""

import pytest
import torch

from tokenreduce import Layout, VisualTokens
from tokenreduce.ops import bipartite_match, merge_tokens
from tokenreduce_strategies.cdpruner import CDPruner, conditional_relevance
from tokenreduce_strategies.dymu import DyMU, calibrated_threshold
from tokenreduce_strategies.fastervlm import FasterVLM
from tokenreduce_strategies.folder import Folder, fold
from tokenreduce_strategies.gprune import GPrune
from tokenreduce_strategies.hired import HiRED
from tokenreduce_strategies.holov import HoloV
from tokenreduce_strategies.mmtok import MMTok
from tokenreduce_strategies.otprune import OTPrune
from tokenreduce_strategies.prumerge import PruMerge, neighbour_edges
from tokenreduce_strategies.prumerge_plus import PruMergePlus
from tokenreduce_strategies.prunesid import PruneSID, component_groups
from tokenreduce_strategies.scope import Scope
from tokenreduce_strategies.trim import Trim, prompt_logits
from tokenreduce_strategies.visionzip import zip_tokens
from tokenreduce_strategies.vispruner import VisPruner
from tokenreduce_strategies.vscan import VScan


def row_of(features, **signals):
    return VisualTokens.from_grid(features, (1, features.shape[1]), signals=signals)


@pytest.mark.parametrize("case", ["b3_n144_k29", "n256_k64", "n576_k58"])
def test_fastervlm(parity_case, case):
    case = parity_case(f"fastervlm/{case}")
    attention = case.inputs["cls_attention"].mean(1)
    tokens = row_of(case.inputs["features"], class_attention=attention)
    strategy = FasterVLM(keep=case.parameters["keep"])
    case.check(kept_indices=strategy(tokens).positions, scores=strategy.score(tokens).exp())


@pytest.mark.parametrize("case", ["b2_n144_d20_c12", "n196_d26_c6", "n576_d53_c10"])
def test_visionzip(parity_case, case):
    case = parity_case(f"visionzip/{case}")
    features, keys = case.inputs["hidden_states"], case.inputs["keys"]
    batch, rows, _ = features.shape
    zipped = zip_tokens(case.inputs["cls_attention"].sum(1), keys[:, 1:], **case.parameters)
    # The recorded numbering begins with the class token, and rows list the dominant tokens first.
    first = torch.zeros(batch, 1, dtype=torch.long)
    dominant = case.expected["kept_indices_sorted"]
    contextual = torch.stack(
        [p[~torch.isin(p, d)] for p, d in zip(zipped.positions + 1, dominant, strict=True)]
    )
    listed = torch.cat([dominant, contextual], dim=1)
    row = torch.zeros(batch, rows, dtype=torch.long)
    row.scatter_(1, listed, torch.arange(listed.shape[1]).expand_as(listed))
    stands = torch.cat([first, zipped.positions + 1], dim=1)
    assignment = row.gather(1, stands.gather(1, torch.cat([first, zipped.groups + 1], dim=1)))
    weights = torch.cat([torch.ones(batch, 1), zipped.weights], dim=1)
    merged = features.new_zeros(batch, listed.shape[1], features.shape[2])
    merged.scatter_add_(1, assignment[..., None].expand_as(features), features * weights[..., None])
    case.check(contextual_indices=contextual, assignment=assignment, merged_features=merged)


@pytest.mark.parametrize("case", ["b2_n144_k24", "n196_k40_m4", "n256_k32"])
def test_cdpruner(parity_case, case):
    case = parity_case(f"cdpruner/{case}")
    image, text = case.inputs["image_embeds"], case.inputs["text_embeds"]
    text = text.expand(image.shape[0], -1, -1)
    tokens = row_of(
        case.inputs["features"], joint_image_embeddings=image, joint_text_embeddings=text
    )
    keep = case.parameters["keep"]
    case.check(
        kept_indices=CDPruner(keep=keep, official=True).select(tokens, keep),
        scores_relevance=conditional_relevance(image, text, official=True),
    )


@pytest.mark.parametrize("case", ["b2_n144_k40_alpha1_5", "n196_k24_noattn", "n256_k32"])
def test_scope(parity_case, case):
    case = parity_case(f"scope/{case}")
    features, keep = case.inputs["features"], case.parameters["keep"]
    attention = case.inputs.get("cls_attention", torch.ones(features.shape[:2]))
    tokens = row_of(features, class_attention=attention)
    strategy = Scope(keep=keep, alpha=case.parameters["alpha"])
    case.check(kept_indices=strategy.select(tokens, keep))


@pytest.mark.parametrize("case", ["b2_n100_k40_r025", "n144_k96", "n256_k200"])
def test_vispruner(parity_case, case):
    case = parity_case(f"vispruner/{case}")
    attention = case.inputs["cls_attention"].mean(1)
    tokens = row_of(case.inputs["features"], class_attention=attention)
    strategy = VisPruner(
        keep=case.parameters["keep"], important=case.parameters["important_ratio"], official=True
    )
    case.check(kept_indices=strategy(tokens).positions)


def class_attention(queries, keys):
    """Attention of the class token in row 0, without heads, to the others."""
    logits = (queries[:, :1] @ keys.transpose(1, 2)).squeeze(1) / keys.shape[2] ** 0.5
    return logits.softmax(dim=1)[:, 1:]


PRUMERGE = [
    "prumerge/b2_n144_ratio_1_4",
    "prumerge/n196_ratio_1_8",
    "prumerge/n256_adaptive",
    "prumerge_plus/n576_a",
    "prumerge_plus/n576_b",
    "prumerge_plus/n576_c",
]


@pytest.mark.parametrize("case", PRUMERGE)
def test_prumerge(parity_case, case):
    strategy = PruMergePlus if "plus" in case else PruMerge
    case = parity_case(case)
    features, keys = case.inputs["features"], case.inputs["keys"]
    attention = class_attention(case.inputs["queries"], keys)
    budget = {} if case.parameters["adaptive"] else {"keep_ratio": case.parameters["ratio"]}
    reducer = strategy(official=True, neighbours=case.parameters["neighbours"], **budget)
    kept = reducer.choose(attention)
    case.check(scores=attention, kept_indices_sorted=kept.sort(dim=1).values)
    # Rows of the official output follow the order of attention, then the samples.
    listed = case.expected["kept_indices"]
    edges = neighbour_edges(listed, attention, keys[:, 1:], reducer.neighbours)
    case.check(merged_features=merge_tokens(features, edges, listed.shape[1] + 1))
    if listed.shape[1] == features.shape[1]:
        return
    reduction = reducer(row_of(features, class_attention=attention, keys=keys[:, 1:]))
    order = listed.argsort(dim=1)
    own = reduction.features[~reduction.synthetic].reshape(*listed.shape, -1)
    wanted = case.expected["merged_features"]
    expected = wanted.gather(1, order[..., None].expand_as(own))
    torch.testing.assert_close(own, expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(
        reduction.features[reduction.synthetic], wanted[:, -1], rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize("case", ["b2_n144_r0_3", "n196_auto", "n576_r0_21"])
def test_trim(parity_case, case):
    case = parity_case(f"trim/{case}")
    features, text = case.inputs["features"], case.inputs["text_embeds"][:, None]
    normal = torch.nn.functional.layer_norm(
        features,
        features.shape[2:],
        case.inputs["post_layernorm_weight"],
        case.inputs["post_layernorm_bias"],
    )
    image = normal @ case.inputs["visual_projection"].T
    ratio = case.parameters["ratio"]
    reducer = Trim(official=True, **({} if ratio == -1 else {"keep_ratio": ratio}))
    reduction = reducer(row_of(features, joint_image_embeddings=image, joint_text_embeddings=text))
    own = ~reduction.synthetic
    kept = reduction.positions[own].reshape(features.shape[0], -1)
    case.check(scores=prompt_logits(image, text).softmax(1), kept_indices_sorted=kept)
    # The official output is float16.
    wanted = case.expected["merged_features"]
    torch.testing.assert_close(
        reduction.features[own].reshape(wanted[:, :-1].shape), wanted[:, :-1], rtol=2e-3, atol=2e-3
    )
    torch.testing.assert_close(
        reduction.features[reduction.synthetic], wanted[:, -1], rtol=2e-3, atol=2e-3
    )


@pytest.mark.parametrize("case", ["n144_r0_1_s07", "n256_r0_25", "n576_r0_5"])
def test_gprune(parity_case, case):
    case = parity_case(f"gprune/{case}")
    tokens, given = row_of(case.inputs["features"][None]), case.parameters
    keep = int(given.pop("ratio") * tokens.count)
    strategy = GPrune(keep=keep, **given)
    case.check(kept_indices_sorted=strategy(tokens).positions[0], scores=strategy.score(tokens)[0])


@pytest.mark.parametrize("case", ["n196_r50_scaled", "n196_r80_unscaled", "n256_r200_fold"])
def test_folder(parity_case, case):
    case = parity_case(f"folder/{case}")
    features, keys = case.inputs["features"], case.inputs["keys"]
    k = features.shape[1] - case.parameters["r"]
    tokens = row_of(features)
    folded = fold(keys, tokens.sizes, k)
    reduction = Folder(keep=k, official=True).merge(tokens, folded)
    case.check(
        assignment=folded.groups,
        merged_features=reduction.features,
        sizes=reduction.group_sizes(),
    )


def test_hired_image(parity_case):
    case = parity_case("hired/single_n576_r0_2")
    attention = case.inputs["cls_attention"].mean(0)[None]
    tokens = row_of(torch.zeros(1, 576, 1), class_attention=attention)
    reduction = HiRED(keep_ratio=case.parameters["budget"], official=True)(tokens)
    case.check(kept_indices_sorted=reduction.positions[0])


@pytest.mark.parametrize("case", ["tiles_1x3_r0_1", "tiles_2x2_r0_2"])
def test_hired_tiles(parity_case, case):
    case = parity_case(f"hired/{case}")
    deep, shallow = (case.inputs[f"cls_attention_{at}"].mean(1) for at in ("deep", "shallow"))
    patches, n = deep.shape
    layout = Layout(torch.cat([Layout.from_grid((24, 24), block=p).coords for p in range(patches)]))
    signals = {
        "class_attention": deep.reshape(1, -1),
        "received_attention": shallow.reshape(1, -1),
    }
    tokens = VisualTokens(torch.zeros(1, patches * n, 1), layout, signals=signals)
    reducer = HiRED(
        keep_ratio=case.parameters["budget"],
        alpha=case.parameters["alpha"],
        grid=tuple(case.parameters["grid"]),
        shallow="received_attention",
        official=True,
    )
    kept = reducer(tokens).positions[0]
    case.check(kept_indices_sorted=kept, budgets=torch.bincount(kept // n, minlength=patches))


@pytest.mark.parametrize("case", ["n144_need64", "n196_need128", "n256_need96"])
def test_prunesid(parity_case, case):
    case = parity_case(f"prunesid/{case}")
    features, need = case.inputs["hidden_states"][:, 1:], case.parameters["need"]
    tokens = row_of(features, class_attention=case.inputs["cls_attention"].mean(1))
    kept = PruneSID(keep=need, official=True)(tokens).positions
    # The recorded numbering begins with the class token.
    kept = torch.cat([kept.new_zeros(1, 1), kept + 1], dim=1)
    groups = component_groups(features, need // 4)[0]
    case.check(
        kept_indices_sorted=kept, group_sizes_sorted=torch.bincount(groups).sort().values[None]
    )


@pytest.mark.parametrize("case", ["b2_n196_thr", "b3_n196_r48", "n196_single_thr"])
def test_dymu(parity_case, case):
    single = "single" in case
    case = parity_case(f"dymu/{case}")
    features, keys = case.inputs["features"], case.inputs["keys"]
    threshold = case.parameters["threshold"]
    if threshold is None:
        threshold = calibrated_threshold(keys, case.parameters["r"])
        case.check(threshold=torch.tensor([threshold]))
    assignment, merged, sizes = [], [], []
    longest = case.expected["merged_features"].shape[1]
    for x, own in zip(features, keys, strict=True):
        reduction = DyMU(threshold=threshold)(row_of(x[None], keys=own[None]))
        group = reduction.group_sizes()[0]
        # Rows of the official output: even tokens that stay, by falling similarity (single) or by
        # position, then the odd ones.
        stays = reduction.positions[0]
        if single:
            match = bipartite_match(own[None]).similarity[0]
            rank = torch.where(stays % 2 == 1, 2.0, -match[stays // 2])
        else:
            rank = stays % 2
        order = rank.argsort(stable=True)
        assignment.append(order.argsort()[reduction.assignment[0]])
        share = group / (group + (0 if single else 1e-4))
        means = reduction.features[0] * share[:, None]
        pad = (0, longest - len(order))
        sizes.append(torch.nn.functional.pad(group[order], pad))
        merged.append(torch.nn.functional.pad(means[order], (0, 0, *pad)))
    case.check(
        assignment=torch.stack(assignment),
        merged_features=torch.stack(merged),
        sizes=torch.stack(sizes),
    )
    if not single:
        lengths = (torch.stack(sizes) > 0).sum(1)
        padding = torch.arange(longest) >= lengths[:, None]
        case.check(lengths=lengths, padding_mask=padding)


@pytest.mark.parametrize("case", ["n195_k60_l3", "n256_k32", "n81_k40_alpha1"])
def test_mmtok(parity_case, case):
    case = parity_case(f"mmtok/{case}")
    given = case.parameters
    tokens = row_of(
        case.inputs["features"][None],
        prompt_embeddings=case.inputs["text_embeds"][None],
        vision_features=case.inputs["image_embeds"][None],
    )
    strategy = MMTok(
        keep=given["keep"],
        alpha=given["alpha"],
        text_temperature=given["tv_temp"],
        image_temperature=given["vv_temp"],
        image="vision_features",
    )
    case.check(kept_indices_sorted=strategy(tokens).positions[0])


@pytest.mark.parametrize("case", ["b2_n196_k40", "n100_k80_padded", "n250_k64_p7"])
def test_holov(parity_case, case):
    case = parity_case(f"holov/{case}")
    tokens = row_of(case.inputs["features"], class_attention=case.inputs["cls_attention"])
    keep = case.parameters["keep"]
    strategy = HoloV(keep=keep, regions=case.parameters["num_patches"], official=True)
    kept = strategy(tokens).positions
    # The official code pads with rows of zeros.
    padding = kept.new_full((kept.shape[0], keep - kept.shape[1]), -1)
    case.check(kept_indices_sorted=torch.cat([padding, kept], dim=1))


@pytest.mark.parametrize("case", ["n195_k97", "n256_k32", "n60_k50_wide"])
def test_otprune(parity_case, case):
    case = parity_case(f"otprune/{case}")
    strategy = OTPrune(**case.parameters)
    case.check(kept_indices_sorted=strategy(row_of(case.inputs["features"][None])).positions[0])


@pytest.mark.parametrize("case", ["b2_n576_k129", "n576_k33", "n576_k72"])
def test_vscan(parity_case, case):
    case = parity_case(f"vscan/{case}")
    signals = {
        "class_attention": case.inputs["cls_attention_deep"].mean(1),
        "shallow_class_attention": case.inputs["cls_attention_shallow"].mean(1),
    }
    tokens = VisualTokens.from_grid(case.inputs["features"], (24, 24), signals=signals)
    reduction = VScan(keep=case.parameters["keep"], official=True)(tokens)
    case.check(kept_indices_sorted=reduction.positions, merged_features=reduction.features)
