"""FrameFusion's merging: an oracle in the notation of the paper."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from support.clips import clips, structured_clip
from support.clouds import quick
from tokenreduce import VisualTokens
from tokenreduce.errors import PipelineError
from tokenreduce_strategies.framefusion import FrameFusion
from tokenreduce_strategies.uniform import Uniform

TIE = 2.5e-7


def slow(x, linked):
    """Place, members and mean of each run."""
    frames, places = x.shape[:2]
    outputs = []
    for t in range(frames):
        for p in range(places):
            if linked[t][p]:
                continue
            run = [t]
            while run[-1] + 1 < frames and linked[run[-1] + 1][p]:
                run.append(run[-1] + 1)
            members = [r * places + p for r in run]
            outputs.append((t * places + p, members, x[run, p].double().mean(0)))
    return outputs


def similarities(x):
    unit = torch.nn.functional.normalize(x.double(), dim=-1, eps=1e-8)
    return [[-2.0] * x.shape[1], *(unit[1:] * unit[:-1]).sum(-1).tolist()]


def check(reduction, b, outputs):
    assert reduction.positions[b].tolist() == [place for place, *_ in outputs]
    for m, (_, members, mean) in enumerate(outputs):
        assert (reduction.assignment[b] == m).nonzero().flatten().tolist() == members
        torch.testing.assert_close(reduction.features[b, m].double(), mean, rtol=1e-4, atol=1e-5)


@quick
@given(clips(batches=1), st.sampled_from([0.3, 0.6, 0.9]))
def test_threshold(clip, threshold):
    x = clip.features[0]
    linked = [[s >= threshold for s in row] for row in similarities(x)]
    check(FrameFusion(threshold=threshold)(clip.tokens()), 0, slow(x, linked))


@quick
@given(clips(), st.data())
def test_budget(clip, data):
    _, frames, places, _ = clip.features.shape
    k = data.draw(st.integers(places, frames * places))
    reduction = FrameFusion(keep=k)(clip.tokens())
    links = frames * places - k
    for b, x in enumerate(clip.features):
        s = [v for row in similarities(x) for v in row]
        last = sorted(s, reverse=True)[links - 1] if links else 9.0
        surely = [n for n, v in enumerate(s) if v > last + TIE]
        near = [n for n, v in enumerate(s) if abs(v - last) <= TIE]
        chosen = {*surely, *near[: links - len(surely)]}
        linked = [[t * places + p in chosen for p in range(places)] for t in range(frames)]
        check(reduction, b, slow(x, linked))


def test_less_than_a_frame():
    clip = structured_clip(2, (4, 4, 6), 8)
    reduction = FrameFusion(keep=6)(clip.tokens())
    image = VisualTokens.from_grid(clip.features.mean(1), (4, 6))
    wanted = Uniform(keep=6)(image)
    assert reduction.positions.equal(wanted.positions)
    torch.testing.assert_close(reduction.features, wanted.features)


def test_options():
    assert FrameFusion().count_class == "adaptive"
    assert FrameFusion(keep=3).count_class == "exact"
    with pytest.raises(PipelineError, match="threshold"):
        FrameFusion(threshold=2)
