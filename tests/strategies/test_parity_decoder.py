"""Strategies inside the LLM, and their parts, equal the authors' code on recorded cases."""

import pytest
import torch

from tokenreduce import VisualTokens
from tokenreduce.ops import first_argmax, gather_tokens, merge_tokens, top_k_indices
from tokenreduce.ops.density_peaks import density_peaks
from tokenreduce.ops.merging import group_weights
from tokenreduce.ops.page_rank import attention_page_rank
from tokenreduce_strategies.dart import DART, add_least_similar, largest_keys
from tokenreduce_strategies.feather import Feather
from tokenreduce_strategies.framefusion_prune import FrameFusionPrune
from tokenreduce_strategies.pact import PACT
from tokenreduce_strategies.pyramiddrop import PyramidDrop
from tokenreduce_strategies.sparsevlm import rated
from tokenreduce_strategies.tokencarve import TokenCarve


def row_of(features, **signals):
    return VisualTokens.from_grid(features, (1, features.shape[1]), signals=signals)


DART_CASES = ["n196_r0_75_img2_txt2", "n256_r0_8_order", "n576_r0_889", "n576_r0_95"]


@pytest.mark.parametrize("case", DART_CASES)
def test_dart(parity_case, case):
    case = parity_case(f"dart/{case}")
    options = case.parameters
    states, keys = case.inputs["hidden_states"], case.inputs["keys"].transpose(0, 1).flatten(1)
    start, n = options["image_start"], options["image_length"]
    image, text = slice(start, start + n), slice(start + n, None)
    own = largest_keys(keys[None, image], options["pivot_image"])
    said = largest_keys(keys[None, text], options["pivot_text"])[0] + start + n
    assert own[0].sort().values.equal(case.expected["image_pivots"].sort().values)
    assert said.sort().values.equal(case.expected["text_pivots"].sort().values)
    reducer = DART(
        pivots=options["pivot_image"], keep_ratio=1 - options["reduction_ratio"], official=True
    )
    # Pivots take turns in the recorded order, which is that of a Python set.
    order = case.expected["pivot_order"]
    shares = reducer.shares(n, own.shape[1], len(order))
    kept = torch.zeros(1, n, dtype=torch.bool).scatter(1, own, True)
    kept = add_least_similar(states[None, image], states[None, order], shares, kept)
    case.check(kept_indices_sorted=kept[0].nonzero().flatten())
    tokens = row_of(
        states[None, image],
        decoder_keys=keys[None, image],
        prompt_keys=keys[None, text],
        prompt_states=states[None, text],
    )
    reduction = reducer(tokens)
    assert reduction.kept == len(case.expected["kept_indices"])
    if bool(case.expected["order_free"]):
        case.check(kept_indices_sorted=reduction.positions[0])


TOPK_CASES = ["n300_retain128_layer6", "n576_retain192_layer2", "n66_retain64_layer15"]


@pytest.mark.parametrize("case", TOPK_CASES)
def test_sparsevlm_rating(parity_case, case):
    case = parity_case(f"sparsevlm_topk/{case}")
    attention = case.inputs["text_to_visual_attention"].mean(0).T[None]
    rates = torch.zeros(attention.shape[::2], dtype=torch.bool)
    rates[0, case.inputs["rater_indices"]] = True
    score = rated(attention, rates)
    kept = top_k_indices(score.log(), case.parameters["budget"])
    case.check(scores=score[0], kept_indices_sorted=kept[0])


@pytest.mark.parametrize("case", ["b2_n80_k12", "n60_k6", "n90_k10"])
def test_sparsevlm_clusters(parity_case, case):
    case = parity_case(f"sparsevlm_cluster/{case}")
    features, clusters = case.inputs["features"], case.parameters["cluster_num"]
    batch = features.shape[0]
    counts = torch.full((batch,), clusters)
    peaks = density_peaks(features, counts, neighbors=clusters)
    centres = case.expected["center_indices"]
    assert peaks.centres.nonzero()[:, 1].reshape(batch, -1).equal(centres.sort(1).values)
    row = torch.zeros(features.shape[:2], dtype=torch.long)
    row.scatter_(1, centres, torch.arange(clusters).expand(batch, -1))
    groups = row.gather(1, peaks.centre_of)
    weights = group_weights(groups, torch.ones(features.shape[:2]), clusters)
    case.check(assignment=groups, merged_features=merge_tokens(features, weights, clusters))


PAGE_RANK_CASES = ["b2_h2_n64_noncausal", "h4_n80_damped", "h4_n96"]


@pytest.mark.parametrize("case", PAGE_RANK_CASES)
def test_aim_importance(parity_case, case):
    case = parity_case(f"aim_importance/{case}")
    options = case.parameters
    score = attention_page_rank(
        case.inputs["attention_logits"],
        tau=options["tau"],
        iterations=options["iters"],
        damping=options["damping"],
    )
    ranking = score.argsort(dim=1, descending=True, stable=True)
    case.check(scores=score, ranking=ranking)
    assert first_argmax(score).equal(ranking[:, 0])


def test_framefusion_pruning(parity_case):
    case = parity_case("framefusion/prune_t4_7x7")
    states, options = case.inputs["hidden_states"], case.parameters
    visual = (case.inputs["patch_type"] >= 0).nonzero().flatten()
    received = case.inputs["attention"].mean((0, 1))[visual]
    # What is left to remove of the cost, spread over the 28 layers that the official code assumes.
    done = 1.0
    spent = 0.0
    for share in options["sparsity_history"]:
        done *= 1 - share
        spent += done
    layers, history = 28, len(options["sparsity_history"])
    upper = 1 - (layers * options["cost"] - spent) / ((layers - history) * done)
    keep = round(len(visual) * (1 - upper))
    reduction = FrameFusionPrune(keep=keep)(
        row_of(states[None, visual], decoder_received_attention=received[None])
    )
    kept = torch.ones(len(states), dtype=torch.bool)
    kept[visual] = False
    kept[visual[reduction.positions[0]]] = True
    case.check(kept_indices=kept.nonzero().flatten(), merged_features=states[kept])
    assert gather_tokens(states[None, visual], reduction.positions).equal(reduction.features)


@pytest.mark.parametrize("case", ["b2_n100_second", "n195_first", "n576_first"])
def test_pyramiddrop(parity_case, case):
    case = parity_case(f"pyramiddrop/{case}")
    options = case.parameters
    start, length = options["image_start"], options["image_length"]
    attention = case.expected["last_token_attention"].mean(1)
    states = case.inputs["hidden_states"][:, start : start + attention.shape[1]]
    # The official code rounds down.
    keep = int(length * options["ratios"][options["cut"]])
    reduction = PyramidDrop(keep=keep)(row_of(states, last_token_attention=attention))
    case.check(kept_indices_sorted=reduction.positions)


@pytest.mark.parametrize("case", ["n213_second_cut", "n576_r0_3_s3", "n729_r0_25_s4"])
def test_feather(parity_case, case):
    case = parity_case(f"feather/{case}")
    options, attention = case.parameters, case.inputs["attention"][None]
    n, side = attention.shape[1], int(options["original"] ** 0.5)
    grid = (side, side) if options["cut"] == 1 else (1, n)
    tokens = VisualTokens.from_grid(
        torch.zeros(1, n, 1), grid, signals={"unrotated_attention": attention}
    )
    if options["cut"] == 1:
        strategy = Feather(keep_ratio=options["ratio"], stride=options["stride"], official=True)
    else:
        keep = int(options["original"] * options["ratio"] ** 2)
        strategy = Feather(keep=keep, stride=0, official=True)
    case.check(kept_indices_sorted=strategy(tokens).positions[0])


@pytest.mark.parametrize("case", ["n49_k8", "n60_k20", "n81_k31_w025"])
def test_tokencarve(parity_case, case):
    case = parity_case(f"tokencarve/{case}")
    options = case.parameters
    start = options["image_start"]
    states = case.inputs["hidden_states"][:, start : start + options["image_length"]]
    attention = case.inputs["last_token_attention"].mean(0, keepdim=True)
    # The official weight is that of attention.
    strategy = TokenCarve(keep=options["keep"], balance=1 - options["weight"], official=True)
    reduction = strategy(row_of(states, last_token_attention=attention))
    case.check(kept_indices_sorted=reduction.positions[0], merged_features=reduction.features[0])


@pytest.mark.parametrize("case", ["n196_r0_21", "n255_r0_1", "n81_r0_4"])
def test_pact(parity_case, case):
    case = parity_case(f"pact/{case}")
    strategy = PACT(radius=case.parameters["cutoff"], important=case.parameters["important"])
    tokens = row_of(case.inputs["features"][None], decoder_keys=case.inputs["keys"][None])
    reduction = strategy(tokens)
    case.check(kept_indices_sorted=reduction.positions[0], merged_features=reduction.features[0])
