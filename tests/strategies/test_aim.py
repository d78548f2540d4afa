"""AIM's merging: an oracle in the notation of the paper."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from support.clips import clips, structured_clip
from support.clouds import quick
from tokenreduce_strategies.aim import AIM, merge_rounds, rounds

TIE = 2.5e-7


def slow(x, keep):
    """Place, members and feature of each output of one frame, round after round."""
    outputs = [(p, [p], x[p].double()) for p in range(len(x))]
    while len(outputs) > keep:
        r = min(len(outputs) - keep, len(outputs) // 2)
        unit = [torch.nn.functional.normalize(o[2], dim=0, eps=1e-8) for o in outputs]
        edges = []
        for i in range(0, len(outputs), 2):
            cosine = {j: float(unit[i] @ unit[j]) for j in range(1, len(outputs), 2)}
            j = next(j for j, c in cosine.items() if c >= max(cosine.values()) - TIE)
            edges.append((i, j, cosine[j]))
        threshold = sorted((c for *_, c in edges), reverse=True)[r - 1]
        surely = [e for e in edges if e[2] > threshold + TIE]
        near = [e for e in edges if e not in surely and e[2] >= threshold - TIE]
        merges = surely + near[: r - len(surely)]
        gone = {i for i, *_ in merges}
        merged = []
        for j, (place, members, feature) in enumerate(outputs):
            if j in gone:
                continue
            joined = [outputs[i] for i, target, _ in merges if target == j]
            mean = torch.stack([feature, *(o[2] for o in joined)]).mean(0)
            merged.append((place, members + [m for o in joined for m in o[1]], mean))
        outputs = merged
    return outputs


@quick
@given(clips(max_frames=4), st.data())
def test_oracle(clip, data):
    frames, height, width = clip.grid
    places = height * width
    k = data.draw(st.integers(1, frames * places))
    reduction = AIM(keep=k)(clip.tokens())
    runs = min(frames, k)
    sizes = [frames // runs + (r < frames % runs) for r in range(runs)]
    budgets = [k // runs + (r < k % runs) for r in range(runs)]
    if k == frames * places:
        return
    for b, item in enumerate(clip.features):
        outputs, start = [], 0
        for size, budget in zip(sizes, budgets, strict=True):
            run = slow(item[start : start + size].flatten(0, 1), budget)
            at = start * places
            outputs += [(at + place, [at + m for m in ms], f) for place, ms, f in run]
            start += size
        assert reduction.positions[b].tolist() == [place for place, *_ in outputs]
        for m, (_, members, feature) in enumerate(outputs):
            assert (reduction.assignment[b] == m).nonzero().flatten().tolist() == sorted(members)
            torch.testing.assert_close(
                reduction.features[b, m].double(), feature, rtol=1e-4, atol=1e-5
            )


def test_rounds():
    assert rounds(196, 49) == [98, 49]
    assert rounds(49, 13) == [24, 12]
    assert rounds(7, 7) == []
    assert rounds(9, 1) == [4, 2, 1, 1]


def test_the_official_order_differs_in_odd_frames_alone():
    for side, same in ((8, True), (7, False)):
        tokens = structured_clip(1, (2, side, side), 16, seed=3).tokens()
        ours = AIM(keep=2 * (side * side // 4))(tokens)
        theirs = AIM(keep=2 * (side * side // 4), official=True)(tokens)
        assert ours.assignment.equal(theirs.assignment) == same
        assert ours.kept == theirs.kept


def test_a_round_of_none_changes_nothing():
    frames = structured_clip(1, (2, 1, 5), 8).features[0]
    for by_similarity in (False, True):
        once = merge_rounds(frames, [2], by_similarity=by_similarity)
        twice = merge_rounds(frames, [0, 2, 0], by_similarity=by_similarity)
        for one, two in zip(once, twice, strict=True):
            assert one.equal(two)
    alone = merge_rounds(frames[:, :2], [1, 0])
    assert alone.features.shape == (2, 1, 8)
