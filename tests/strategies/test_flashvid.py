"""FlashVID: oracles in the notation of the paper for segments, links and trees."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from support.clips import clips, structured_clip
from support.clouds import quick
from tokenreduce.errors import MissingSignal, PipelineError
from tokenreduce.ops.frames import segment_lengths
from tokenreduce_strategies.flashvid import FlashVID, merge_segments

TIE = 2.5e-7


def slow_trees(x, free, keep, threshold):
    """The root of every free token, by definition."""
    frames, places = x.shape[:2]
    unit = torch.nn.functional.normalize(x.double(), dim=-1, eps=1e-8)
    links = []
    for t in range(1, frames):
        for p in range(places):
            before = {
                q: float(unit[t, p] @ unit[t - 1, q]) for q in range(places) if free[t - 1, q]
            }
            if not free[t, p] or not before:
                continue
            q = next(q for q, c in before.items() if c >= max(before.values()) - TIE)
            if before[q] > threshold:
                links.append((t * places + p, (t - 1) * places + q, before[q]))
    most = int(free.sum()) - keep
    if len(links) > most:
        last = sorted((c for *_, c in links), reverse=True)[most - 1] if most else 9
        surely = [e for e in links if e[2] > last + TIE]
        links = surely + [e for e in links if abs(e[2] - last) <= TIE][: most - len(surely)]
    parents = {child: parent for child, parent, _ in links}
    roots = {}
    for n in range(frames * places):
        root = n
        while root in parents:
            root = parents[root]
        if free.flatten()[n]:
            roots[n] = root
    return roots


@quick
@given(clips(max_frames=5, max_side=3, batches=1), st.data())
def test_trees(clip, data):
    x = clip.features[0]
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 100)))
    free = torch.rand(x.shape[:2], generator=generator) < 0.8
    free[0, 0] = True
    # With as many outputs as trees nothing is clustered.
    roots = slow_trees(x, free, 1, 0.7)
    keep = len(set(roots.values()))
    merged = merge_segments(x, ~free, [len(x)], [keep], threshold=0.7)
    assert {n: int(s) for n, s in enumerate(merged.stands.tolist()) if s >= 0} == roots
    sizes = torch.bincount(torch.tensor(list(roots.values())), minlength=free.numel())
    for n, root in roots.items():
        assert float(merged.values[n]) == pytest.approx(1 / int(sizes[root]))


@quick
@given(clips(max_frames=5, max_side=3, batches=1), st.data())
def test_links_give_way_to_the_budget(clip, data):
    x = clip.features[0]
    free = torch.ones(x.shape[:2], dtype=torch.bool)
    keep = data.draw(st.integers(1, free.numel()))
    merged = merge_segments(x, ~free, [len(x)], [keep], threshold=0.0)
    assert len(merged.stands[merged.stands >= 0].unique()) == keep
    trees = slow_trees(x, free, keep, 0.0)
    if len(set(trees.values())) == keep:
        assert merged.stands.tolist() == list(trees.values())


def test_segments():
    means = torch.tensor([[1.0, 0], [1, 0.1], [0, 1], [0, 1], [0.3, 1], [1, 0]])
    assert segment_lengths(means, 0.9, 1) == [2, 3, 1]
    assert segment_lengths(means, 0.9, 4) == [2, 2, 1, 1]
    assert segment_lengths(means, 0.9, 99) == [1] * 6
    assert segment_lengths(means[:1], 0.9, 8) == [1]


def test_a_still_clip_becomes_the_mean_of_its_frames():
    clip = structured_clip(1, (4, 3, 3), 16, change=0)
    still = clip._replace(features=clip.features[:, :1].expand(1, 4, 9, 16))
    attention = torch.ones(1, 4, 9)
    strategy = FlashVID(keep=9, alpha=0, min_segments=1)
    reduction = strategy(still.tokens(class_attention=attention))
    torch.testing.assert_close(reduction.features[0], still.features[0, 0])
    assert reduction.group_sizes().tolist() == [[4] * 9]


def test_salient_tokens_are_kept_as_they_are():
    clip = structured_clip(1, (4, 4, 4), 16)
    attention = torch.full((1, 4, 16), 0.01)
    attention[..., 5] = 1
    tokens = clip.tokens(class_attention=attention)
    reduction = FlashVID(keep=16)(tokens)
    for t in range(4):
        output = int((reduction.positions[0] == t * 16 + 5).nonzero())
        assert torch.equal(reduction.features[0, output], clip.features[0, t, 5])


def test_diversity_alone_needs_no_attention():
    tokens = structured_clip(1, (4, 3, 3), 16).tokens()
    assert FlashVID(keep=10, selection="div")(tokens).kept == 10
    with pytest.raises(MissingSignal):
        FlashVID(keep=10)(tokens)


@pytest.mark.parametrize(
    "options",
    [
        {"alpha": 1.2},
        {"temporal_threshold": 2},
        {"segment_threshold": -2},
        {"min_segments": 0},
        {"selection": "attention"},
    ],
)
def test_options(options):
    with pytest.raises(PipelineError, match=next(iter(options))):
        FlashVID(keep=4, **options)
