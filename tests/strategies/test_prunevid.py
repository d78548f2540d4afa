"""PruneVid: an oracle in the notation of its description."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from support.clips import clips, structured_clip
from support.clouds import quick
from tokenreduce.errors import PipelineError
from tokenreduce.ops.density_peaks import density_peaks
from tokenreduce.ops.quotas import apportion
from tokenreduce_strategies.prunevid import PruneVid, mean_cosine, scenes


def runs(scene):
    """First and last frame of each scene."""
    numbers = scene.tolist()
    return [
        (numbers.index(s), len(numbers) - 1 - numbers[::-1].index(s))
        for s in range(max(numbers) + 1)
    ]


@quick
@given(clips(batches=1))
def test_mean_cosine(clip):
    x = clip.features[0]
    scene = scenes(x.mean(1), max(1, len(x) // 3))
    got = mean_cosine(x, scene, torch.bincount(scene))
    unit = torch.nn.functional.normalize(x.double(), dim=-1, eps=1e-8)
    for s, (start, end) in enumerate(runs(scene)):
        for p in range(x.shape[1]):
            pairs = [
                float(unit[i, p] @ unit[j, p])
                for i in range(start, end + 1)
                for j in range(i + 1, end + 1)
            ]
            mean = sum(pairs) / len(pairs) if pairs else 1
            assert abs(float(got[s, p]) - mean) < 1e-5


def slow(x, k):
    """Outputs of one clip by place; None where still places would have to be dissolved."""
    frames, places, _ = x.shape
    scene = scenes(x.mean(1), max(1, int(frames / 4 + 0.5)))
    alike = mean_cosine(x, scene, torch.bincount(scene))
    sets = []
    for s, (start, end) in enumerate(runs(scene)):
        still = [p for p in range(places) if end > start and float(alike[s, p]) >= 0.8]
        sets.append((start, {p: x[start : end + 1, p].double().mean(0) for p in still}))
    for t in range(frames):
        still = sets[int(scene[t])][1]
        sets.append((t, {p: x[t, p].double() for p in range(places) if p not in still}))
    sizes = torch.tensor([len(members) for _, members in sets])
    if int(sizes.sum()) < k:
        return None
    counts = apportion((sizes - 1).clamp(min=0).float(), k, sizes, least=1)
    outputs = {}
    for (frame, members), count in zip(sets, counts.tolist(), strict=True):
        if not count:
            continue
        at = sorted(members)
        tokens = torch.stack([members[p] for p in at])
        peaks = density_peaks(tokens[None].float(), torch.tensor([count]))
        for c in peaks.centres[0].nonzero().flatten().tolist():
            outputs[frame * places + at[c]] = tokens[peaks.centre_of[0] == c].mean(0)
    return outputs


@quick
@given(clips(batches=1), st.data())
def test_oracle(clip, data):
    x = clip.features[0]
    n = x.shape[0] * x.shape[1]
    if n == 1:
        return
    k = data.draw(st.integers(1, n - 1))
    reduction = PruneVid(keep=k)(clip.tokens())
    outputs = slow(x, k)
    assert reduction.kept == k
    if outputs is None:
        return
    assert reduction.positions[0].tolist() == sorted(outputs)
    features = torch.stack([outputs[place] for place in sorted(outputs)])
    torch.testing.assert_close(reduction.features[0].double(), features, rtol=1e-4, atol=1e-5)


def test_a_still_scene_becomes_its_mean():
    clip = structured_clip(1, (8, 3, 3), 16, change=0.05)
    reduction = PruneVid(keep=18)(clip.tokens())
    assert reduction.positions[0].tolist() == [*range(9), *range(36, 45)]
    torch.testing.assert_close(reduction.features[0, :9], clip.features[0, :4].mean(0))


def test_options():
    for options in ({"segments": 0}, {"tau": 2}):
        with pytest.raises(PipelineError, match=next(iter(options))):
            PruneVid(keep=4, **options)
