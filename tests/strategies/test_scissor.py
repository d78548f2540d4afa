"""Scissor: an oracle in the notation of the paper."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from support.clips import clips, structured_clip
from support.clouds import quick
from tokenreduce.errors import PipelineError, ReductionError, TokensError
from tokenreduce.ops import limits
from tokenreduce_strategies import scissor
from tokenreduce_strategies.scissor import Scissor


def connected(x, tau):
    """Connected components of the graph of cosines above tau, by flooding, in order."""
    unit = torch.nn.functional.normalize(x.double(), dim=-1, eps=1e-8)
    left, found = list(range(len(x))), []
    while left:
        component, frontier = [], [left.pop(0)]
        while frontier:
            i = frontier.pop()
            component.append(i)
            near = [j for j in left if float(unit[i] @ unit[j]) > tau]
            left = [j for j in left if j not in near]
            frontier += near
        found.append(sorted(component))
    return found


def slow(x, tau):
    """Output features by component, and the one that each token joins."""
    means, members = [], []
    for t, frame in enumerate(x):
        for component in connected(frame, tau):
            means.append(frame[component].double().mean(0))
            members.append([t * len(frame) + p for p in component])
    groups = connected(torch.stack(means), tau)
    centres = torch.stack([torch.stack([means[i] for i in group]).mean(0) for group in groups])
    unit = torch.nn.functional.normalize(centres, dim=-1, eps=1e-8)
    joined = [[] for _ in groups]
    for n, token in enumerate(x.flatten(0, 1).double()):
        cosine = unit @ torch.nn.functional.normalize(token, dim=0, eps=1e-8)
        joined[next(i for i, c in enumerate(cosine) if c >= cosine.max() - 1e-6)].append(n)
    flat = x.flatten(0, 1).double()
    features = [
        (centre + flat[tokens].sum(0)) / (len(tokens) + 1)
        for centre, tokens in zip(centres, joined, strict=True)
    ]
    return features, joined, [sorted(n for i in group for n in members[i]) for group in groups]


@quick
@given(clips(max_frames=4, max_side=3, batches=1), st.sampled_from([0.5, 0.8, 0.95]))
def test_oracle(clip, tau):
    reduction = Scissor(tau=tau)(clip.tokens())
    features, joined, members = slow(clip.features[0], tau)
    assert reduction.kept == len(features)
    for feature, mine, component in zip(features, joined, members, strict=True):
        loyal = [n for n in component if n in mine]
        place = min(loyal or component)
        output = reduction.positions[0].tolist().index(place)
        torch.testing.assert_close(
            reduction.features[0, output].double(), feature, rtol=1e-4, atol=1e-5
        )
        if reduction.weights is not None:
            assert (reduction.assignment[0] == output).nonzero().flatten().tolist() == mine
            assert bool(reduction.synthetic[0, output]) == (not loyal)


@quick
@given(clips(max_frames=4, max_side=3, batches=1), st.sampled_from([0.5, 0.8, 0.95]))
def test_the_budget_that_tau_gives_changes_nothing(clip, tau):
    free = Scissor(tau=tau)(clip.tokens())
    if free.kept == free.source_count:
        return
    bound = Scissor(tau=tau, keep=free.kept)(clip.tokens())
    assert bound.positions.equal(free.positions)
    assert bound.assignment.equal(free.assignment)


def test_batches_and_counts():
    tokens = structured_clip(3, (4, 3, 3), 16).tokens()
    assert Scissor().count_class == "adaptive"
    assert Scissor(keep=5).count_class == "exact"
    assert Scissor(keep=5)(tokens).kept == 5
    with pytest.raises(ReductionError, match="different numbers"):
        Scissor(tau=0.8)(tokens)


def test_too_many_components(monkeypatch):
    tokens = structured_clip(1, (4, 3, 3), 16).tokens()
    monkeypatch.setattr(scissor, "MATRIX_LIMIT", 9)
    with pytest.raises(TokensError, match="give a budget"):
        Scissor(tau=0.99)(tokens)
    assert Scissor(tau=0.99, keep=4)(tokens).kept == 4
    monkeypatch.setattr(limits, "MATRIX_LIMIT", 8)
    with pytest.raises(TokensError, match="frames of 9 tokens"):
        Scissor()(tokens)


def test_options():
    with pytest.raises(PipelineError, match="tau"):
        Scissor(tau=1.0)
