"""Video strategies equal the authors' code on recorded cases. A missing case fails."""

from math import ceil

import pytest
import torch

from tokenreduce import VisualTokens
from tokenreduce.ops.frames import previous_cosine, segment_lengths
from tokenreduce_strategies.aim import merge_rounds
from tokenreduce_strategies.dycoke import DyCoke
from tokenreduce_strategies.evs import EVS
from tokenreduce_strategies.flashvid import merge_segments, salient_tokens
from tokenreduce_strategies.framefusion import FrameFusion
from tokenreduce_strategies.free_video_llm import region_boxes
from tokenreduce_strategies.holitom import HoliTom, static_windows, weakest_steps
from tokenreduce_strategies.scissor import Scissor, clip_components
from tokenreduce_strategies.sttm import STTM
from tokenreduce_strategies.vidcom2 import VidCom2, commonness


def clip_tokens(case, **signals):
    """The case as a clip; without a recorded grid, frames are rows of tokens."""
    features = case.inputs["features"]
    if features.ndim == 3:
        grid = (features.shape[0], 1, features.shape[1])
        features = features.flatten(0, 1)
    else:
        t, h, w = case.inputs["grid"].tolist()
        merge = case.parameters.get("spatial_merge_size", 1)
        grid = (t, h // merge, w // merge)
    flat = {name: signal.reshape(1, -1) for name, signal in signals.items()}
    return VisualTokens.from_grid(features, grid, signals=flat)


@pytest.mark.parametrize("case", ["t4_6x9_q0_9_floor", "t6_14x14_merge2_q0_5", "t8_7x7_q0_75"])
def test_evs(parity_case, case):
    case = parity_case(f"evs/{case}")
    strategy = EVS(keep_ratio=1 - case.parameters["q"], official=True)
    case.check(kept_indices=strategy(clip_tokens(case)).positions[0])


@pytest.mark.parametrize("case", ["t6_14x14_r0_15", "t8_10x10_r0_5", "t8_7x7_r0_25"])
def test_vidcom2(parity_case, case):
    case = parity_case(f"vidcom2/{case}")
    tokens, ratio = clip_tokens(case), case.parameters["ratio"]
    usual = commonness(tokens.features.unflatten(1, (tokens.grid[0], -1)))
    kept = VidCom2(keep_ratio=ratio, official=True)(tokens).positions[0]
    frame = kept // (tokens.count // tokens.grid[0])
    case.check(
        scores=usual.tokens[0],
        frame_scales=(ratio * usual.frames[0]).clamp(max=1),
        frame_counts=torch.bincount(frame, minlength=tokens.grid[0]),
        kept_indices=kept,
    )


@pytest.mark.parametrize("case", ["t16_6x6_r0_5", "t8_14x14_r0_9", "t8_7x7_r0_7"])
def test_dycoke(parity_case, case):
    case = parity_case(f"dycoke/{case}")
    strategy = DyCoke(official=True, merging_ratio=case.parameters["merging_ratio"])
    reduction = strategy(clip_tokens(case))
    case.check(kept_indices_sorted=reduction.positions[0])
    # The official code lists them by similarity.
    listed = case.expected["kept_indices"].argsort()
    assert torch.equal(reduction.features[0], case.expected["merged_features"][listed])


@pytest.mark.parametrize(
    "case", ["t2_n196_half_quarter", "t4_n100_one_step", "t4_n49_half_quarter"]
)
def test_aim(parity_case, case):
    case = parity_case(f"aim_merge/{case}")
    merges = case.parameters["r_per_step"]
    done = merge_rounds(case.inputs["features"], merges, by_similarity=True)
    weights = torch.zeros_like(case.expected["weights"])
    weights.scatter_(1, done.groups[:, None], done.weights[:, None])
    case.check(assignment=done.groups, merged_features=done.features, weights=weights)


@pytest.mark.parametrize("case", ["t3_n196_k24_div", "t4_n100_k20_v2", "t4_n49_k10"])
def test_flashvid_selection(parity_case, case):
    case = parity_case(f"flashvid_adts/{case}")
    frames, attention = case.inputs["features"], case.inputs["cls_attention"]
    picks = salient_tokens(
        frames[None], attention[None], case.parameters["keep"], case.parameters["variant"]
    )
    case.check(kept_indices_sorted=picks[0].sort(dim=1).values)


@pytest.mark.parametrize("case", ["t6_7x7_r0_3_noseg", "t8_10x10_r0_15_cut", "t8_7x7_r0_25"])
def test_flashvid(parity_case, case):
    case = parity_case(f"flashvid/{case}")
    frames, attention = case.inputs["features"], case.inputs["cls_attention"]
    options = case.parameters
    count, places, _ = frames.shape
    budget = ceil(places * options["retention_ratio"] * options["expansion"])
    picked = ceil(budget * options["alpha"])
    lengths = [count]
    if options.get("do_segment", True):
        least = options["min_segment_num"]
        lengths = segment_lengths(frames.mean(1), options["segment_threshold"], least)
    picks = salient_tokens(frames[None], attention[None], picked, "attn_div")[0]
    selected = torch.zeros(count, places, dtype=torch.bool).scatter_(1, picks, True)
    # A selected token may stand beside a cluster at its own place; it comes first.
    rows = [(n, 0, frames.flatten(0, 1)[n]) for n in selected.flatten().nonzero().flatten()]
    merged = merge_segments(
        frames,
        selected,
        lengths,
        [(budget - picked) * length for length in lengths],
        threshold=options["temporal_threshold"],
        official=True,
    )
    for centre in merged.stands[merged.stands >= 0].unique():
        mine = merged.stands == centre
        feature = (frames.flatten(0, 1)[mine] * merged.values[mine, None]).sum(0)
        rows.append((centre, 1, feature))
    rows.sort(key=lambda row: (int(row[0]), row[1]))
    case.check(
        budgets=torch.tensor([picked, budget - picked]),
        segment_lengths=torch.tensor(lengths),
        kept_indices=torch.stack([n for n, *_ in rows]),
        merged_features=torch.stack([feature for *_, feature in rows]),
    )


@pytest.mark.parametrize("case", ["t3_12x12_tau0_9", "t4_7x7_tau0_9", "t6_8x8_tau0_95"])
def test_scissor(parity_case, case):
    case = parity_case(f"scissor/{case}")
    tokens, tau = clip_tokens(case), case.parameters["tau"]
    found = clip_components(tokens.features[0].unflatten(0, (tokens.grid[0], -1)), tau)
    # Ours are numbered by first token, the official ones by highest degree.
    spatial = case.expected["spatial_components"].flatten()
    temporal = case.expected["temporal_components"]
    assert one_to_one(found.spatial, spatial)
    assert one_to_one(found.temporal[found.spatial], temporal[spatial])
    row = torch.zeros(len(found.means), dtype=torch.long)
    row[found.temporal[found.spatial]] = temporal[spatial]
    merged = Scissor(tau=tau)(tokens)
    place = torch.zeros_like(row)
    place[found.joins] = merged.assignment[0]
    case.check(merged_features=merged.features[0, place[row.argsort()]])


def one_to_one(ours, theirs):
    """Whether two labellings of the same things differ in the labels alone."""
    pairs = torch.stack([ours, theirs]).unique(dim=1)
    return pairs.shape[1] == len(ours.unique()) == len(theirs.unique())


@pytest.mark.parametrize(
    "case", ["t4_14x14_s0_75_t0_85_root1", "t4_14x14_s0_8", "t6_7x7_s0_8_t0_8"]
)
def test_sttm(parity_case, case):
    case = parity_case(f"sttm/{case}")
    tokens, options = clip_tokens(case), case.parameters
    strategy = STTM(
        threshold=options["threshold"],
        temporal_threshold=options["temporal_threshold"],
        root_level=options["root_level"],
        official=True,
    )
    reduction = strategy(tokens)
    case.check(
        merged_features=reduction.features[0],
        sizes=reduction.group_sizes()[0].long(),
    )
    assert tokens.coords[reduction.positions[0], 1:].equal(case.expected["boxes"][:, :3])


@pytest.mark.parametrize("case", ["t12_6x6_maxwin4", "t6_10x10_full", "t8_7x7_windows"])
def test_holitom_windows(parity_case, case):
    case = parity_case(f"holitom/{case}")
    frames, tau = case.inputs["features"], case.parameters["tau"]
    cosine = previous_cosine(frames[None])[0]
    windows = static_windows(cosine > tau, case.parameters["max_window"])
    spans = torch.tensor(windows.spans)
    lengths = spans[:, 1] - spans[:, 0] + 1
    window = torch.repeat_interleave(torch.arange(len(spans)), lengths)
    still = (weakest_steps(cosine, window, len(spans)) > tau) & (lengths > 1)[:, None]
    means = torch.stack([frames[start : end + 1].mean(0) for start, end in windows.spans])
    case.check(
        windows=spans,
        total_reduced=torch.tensor([float(windows.gain)]),
        static_counts=still.sum(1),
        static_positions=still.nonzero()[:, 1],
        static_features=means[still],
    )


def test_holitom(parity_case):
    case = parity_case("holitom/t6_10x10_full")
    options = case.parameters
    strategy = HoliTom(
        keep_ratio=options["retain_ratio"],
        tau=options["tau"],
        beta=options["Beta"],
        neighbors=options["K"],
        max_window=options["max_window"],
        official=True,
    )
    reduction = strategy(clip_tokens(case, class_attention=case.inputs["cls_attention"]))
    # Every window of this clip is longer than a frame.
    still = reduction.group_sizes()[0] > 1
    case.check(
        static_merged=reduction.features[0, still], dynamic_merged=reduction.features[0, ~still]
    )


@pytest.mark.parametrize("case", ["merge_t6_7x7_capped", "merge_t8_7x7"])
def test_framefusion_merging(parity_case, case):
    case = parity_case(f"framefusion/{case}")
    states, options = case.inputs["hidden_states"], case.parameters
    visual = (case.inputs["patch_type"] >= 0).nonzero().flatten()
    places = int(case.inputs["patch_type"].max()) + 1
    tokens = VisualTokens.from_grid(states[visual], (len(visual) // places, 1, places))
    strategy = FrameFusion(threshold=options["similarity_threshold"])
    share = 1 - strategy(tokens).ratio
    # In the first layer, the official upper bound of the share is 1 - cost.
    if share >= 1 - options["cost"]:
        strategy = strategy.with_budget(keep=len(visual) - int((1 - options["cost"]) * len(visual)))
    else:
        case.check(sparsity_list=torch.tensor([share]))
    reduction = strategy(tokens)
    similarity = torch.full((len(states),), -2.0)
    clip = states[visual].unflatten(0, (-1, places))
    similarity[visual[places:]] = previous_cosine(clip[None]).flatten()
    kept = torch.ones(len(states), dtype=torch.bool)
    kept[visual] = False
    kept[visual[reduction.positions[0]]] = True
    merged = states.clone()
    merged[visual[reduction.positions[0]]] = reduction.features[0]
    case.check(
        similarity=similarity,
        kept_indices=kept.nonzero().flatten(),
        merged_features=merged[kept],
    )


@pytest.mark.parametrize("case", ["t12_12x12_r0_25", "t6_10x16_r0_4", "t8_24x24_r0_6"])
def test_free_video_llm_regions(parity_case, case):
    case = parity_case(f"freevideollm_roi/{case}")
    options = case.parameters
    boxes = region_boxes(case.inputs["points"], options["h"], options["w"], options["ratio"])
    case.check(**boxes._asdict())
