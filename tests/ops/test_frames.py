"""Comparison of frames, token by token."""

import torch
from hypothesis import given

from support.clips import clips
from support.clouds import quick
from tokenreduce.ops.frames import previous_cosine, same_place_cosine


@quick
@given(clips())
def test_oracle(clip):
    x = clip.features
    reference = [(3 * t + 1) % x.shape[1] for t in range(x.shape[1])]
    got = same_place_cosine(x, reference)
    for b, t, p in torch.cartesian_prod(*(torch.arange(n) for n in x.shape[:3])).tolist():
        one, other = x[b, t, p].double(), x[b, reference[t], p].double()
        lengths = one.norm() * other.norm()
        cosine = float(one @ other / lengths) if lengths else 0
        assert abs(float(got[b, t, p]) - cosine) < 1e-5
    before = same_place_cosine(x, [0, *range(x.shape[1] - 1)])[:, 1:]
    assert previous_cosine(x).equal(before)
