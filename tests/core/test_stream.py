"""A stream: the batch result while all fits, and whatever it is fed in bounded memory beyond."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

import tokenreduce as tr
from support.reducers import KeepsAll
from tokenreduce.errors import BudgetError, MissingSignal, TokensError
from tokenreduce.reducer import Grouping, Merger
from tokenreduce.testing.cost import peak_growth

LFTR = tr.create_strategy("lftr", neighbors="torch")
TOPK = tr.create_strategy("norm-topk")


def frames(count: int, side: int = 4, channels: int = 16, *, seed: int = 0) -> torch.Tensor:
    """A still scene with noise and a cut every ten frames, ``(count, side * side, channels)``."""
    generator = torch.Generator().manual_seed(seed)
    scenes = torch.randn(count // 10 + 1, side * side, channels, generator=generator)
    clip = scenes.repeat_interleave(10, 0)[:count]
    return clip + 0.2 * torch.randn(clip.shape, generator=generator)


def fed(reducer, clip, *, step=1, **options) -> tr.TokenStream:
    stream = reducer.stream(**options)
    for part in clip.split(step):
        stream.feed(part.flatten(0, 1), (len(part), 4, 4))
    return stream


@pytest.mark.parametrize("name", ["lftr", "norm-topk", "divprune", "uniform", "tome"])
def test_what_fits_the_window_is_reduced_as_a_whole(name) -> None:
    clip = frames(12)
    reducer = tr.create_strategy(name)
    stream = fed(reducer, clip, budget=30, window=240)
    whole = tr.VisualTokens.from_grid(clip.flatten(0, 1), (12, 4, 4))
    batch = reducer.with_budget(keep=30)(whole)
    tokens = stream.tokens()
    assert stream.positions().equal(batch.positions[0])
    torch.testing.assert_close(tokens.features, batch.features)
    assert tokens.layout == whole.layout.select(batch.positions[0])
    assert tokens.sizes.equal(batch.group_sizes())


@pytest.mark.parametrize("reducer", [LFTR, TOPK])
def test_how_frames_are_fed_does_not_matter(reducer) -> None:
    clip = frames(60)
    streams = [fed(reducer, clip, step=step, budget=50, window=128) for step in (1, 7, 60)]
    for stream in streams[1:]:
        assert stream.positions().equal(streams[0].positions())
        assert stream.tokens().features.equal(streams[0].tokens().features)


def test_the_budget_holds_at_any_time_and_asking_changes_nothing() -> None:
    clip = frames(60)
    asked, quiet = LFTR.stream(budget=50, window=100), LFTR.stream(budget=50, window=100)
    for number, frame in enumerate(clip, 1):
        for stream in (asked, quiet):
            stream.feed(frame, (4, 4))
        tokens = asked.tokens()
        assert tokens.count == min(50, 16 * number)
        positions = asked.positions()
        assert bool((positions.diff() > 0).all())
        t, y, x = tokens.layout.coords[:, 1:].unbind(1)
        assert positions.equal(t * 16 + y * 4 + x)
    assert asked.positions().equal(quiet.positions())
    assert (asked.seen, asked.frames) == (960, 60)


def test_nothing_is_lost_of_what_merges() -> None:
    """Tokens of a clip of still scenes merge into means of their whole extent."""
    clip = frames(40) * 0 + frames(40, seed=1)[:1]
    stream = fed(LFTR, clip, budget=16, window=64)
    tokens = stream.tokens()
    assert tokens.sizes.tolist() == [[40.0] * 16]
    torch.testing.assert_close(tokens.features[0], clip[0], rtol=1e-4, atol=1e-4)


def test_what_was_asked_for_stays_what_it_is() -> None:
    clip = frames(40)
    stream = TOPK.stream(budget=20, window=64)
    stream.feed(clip[0], (4, 4))
    tokens, positions = stream.tokens(), stream.positions()
    for frame in clip[1:]:
        stream.feed(frame, (4, 4))
    assert tokens.features[0].equal(clip[0])
    assert tokens.layout == tr.Layout.from_grid((4, 4))
    assert positions.equal(torch.arange(16))


def test_norm_topk_is_exact_at_any_length() -> None:
    clip = frames(100)
    stream = fed(TOPK, clip, budget=20, window=64)
    batch = TOPK.with_budget(keep=20)(tr.VisualTokens.from_grid(clip.flatten(0, 1), (100, 4, 4)))
    assert stream.positions().equal(batch.positions[0])


@pytest.mark.parametrize("name", ["lftr", "norm-topk", "divprune", "tome"])
@pytest.mark.parametrize("count", [12, 90])
def test_what_a_strategy_does_not_see_goes_along(name, count) -> None:
    clip = frames(count)
    reducer = tr.create_strategy(name)
    seen = fed(reducer, clip, budget=30, window=200)
    wide = fed(reducer, torch.cat([clip, -3 * clip], 2), budget=30, window=200, channels=16)
    assert wide.positions().equal(seen.positions())
    own, further = wide.tokens().features.chunk(2, dim=-1)
    torch.testing.assert_close(own, seen.tokens().features)
    torch.testing.assert_close(further, -3 * own)


def test_a_frame_larger_than_the_window() -> None:
    stream = TOPK.stream(budget=5, window=10)
    stream.feed(frames(3).flatten(0, 1), (3, 4, 4))
    whole = tr.VisualTokens.from_grid(frames(3).flatten(0, 1), (3, 4, 4))
    assert stream.positions().equal(TOPK.with_budget(keep=5)(whole).positions[0])


def test_what_a_stream_cannot_do_is_refused() -> None:
    clip = frames(2)
    with pytest.raises(BudgetError, match="at least one"):
        TOPK.stream(budget=0)
    with pytest.raises(TokensError, match="window"):
        TOPK.stream(budget=3, window=0)
    with pytest.raises(MissingSignal, match="class_attention"):
        tr.create_strategy("fastervlm").stream(budget=3)
    with pytest.raises(TokensError, match="full grid"):
        tr.create_strategy("avg-pool").stream(budget=3)
    stream = TOPK.stream(budget=3)
    with pytest.raises(TokensError, match="nothing was fed"):
        stream.tokens()
    with pytest.raises(TokensError, match="their grid"):
        stream.feed(clip[0], (3, 4))
    stream.feed(clip[0], (4, 4))
    with pytest.raises(TokensError, match="channels"):
        stream.feed(clip[0].double(), (4, 4))
    with pytest.raises(BudgetError, match="does not meet a budget"):
        fed(KeepsAll(), frames(40), budget=3, window=20)


@dataclass(frozen=True, kw_only=True)
class Runs(Merger):
    """Merges runs of equal length; needs next to no memory itself."""

    def assign(self, tokens, k):
        return (torch.arange(tokens.count) * k // tokens.count).expand(tokens.batch, -1)


def test_memory_is_twice_the_budget_and_the_window() -> None:
    channels, budget, window = 2048, 1024, 4096
    scene = torch.randn(512, channels)

    def feed() -> None:
        stream = Runs().stream(budget=budget, window=window)
        for number in range(40):
            moved = scene[number : number + 256] + 0.01 * number * scene[128:384]
            stream.feed(moved, (1, 16, 16))
            if number % 16 == 15:
                stream.tokens()

    grown = peak_growth(feed)
    assert grown is None or grown < (2 * budget + window) * 4 * channels


@dataclass(frozen=True, kw_only=True)
class Remembers(Merger):
    """Scores each token by its first channel, and expects to be told so again."""

    def assign(self, tokens, k):
        own = tokens.features[..., 0]
        former = tokens.signals.get("former_scores", torch.full_like(own, torch.nan))
        assert bool((former.isnan() | (former == own)).all())
        assert int((~former.isnan()).sum()) in (0, 34)
        groups = torch.arange(tokens.count) * k // tokens.count
        return Grouping(groups.expand(tokens.batch, -1), scores=own)


def test_scores_come_back_with_what_is_held() -> None:
    tokens = fed(Remembers(), frames(40), budget=20, window=130).tokens()
    assert tokens.count == 20


@pytest.mark.parametrize(
    "reducer",
    [
        tr.per_segment(TOPK, frames=4),
        tr.per_segment(LFTR, frames=20),
        tr.per_frame(tr.create_strategy("divprune")),
        tr.per_tile(LFTR),
    ],
    ids=lambda reducer: f"{reducer.name} {reducer.inner.name}",
)
def test_a_wrapper_can_be_fed(reducer) -> None:
    """It shares the budget among the frames of what is held and what is new."""
    clip = frames(40)
    stream = fed(reducer, clip, budget=40, window=128)
    tokens = stream.tokens()
    assert tokens.features.shape == (1, 40, 16)
    assert bool((stream.positions().diff() > 0).all())
    assert float(tokens.sizes.sum()) <= 640


def test_a_wrapper_that_runs_out_of_budget_says_so() -> None:
    """Each frame of a clip keeps a token; one frame more than that cannot be shared among."""
    reducer = tr.per_frame(TOPK)
    assert fed(reducer, frames(40), budget=40, window=128).tokens().count == 40
    with pytest.raises(BudgetError, match="cannot be shared among"):
        fed(reducer, frames(80), budget=40, window=128)


@pytest.mark.parametrize("count", [2, 30])
def test_chains_have_a_budget_of_their_own(count) -> None:
    with pytest.raises(BudgetError, match="no budget of its own"):
        fed(tr.chain(TOPK), frames(count), budget=40, window=128)


@dataclass(frozen=True, kw_only=True)
class Quarters(Merger):
    """Merges runs of equal length, and tells what the stream says of the tokens."""

    told: ClassVar[list[dict[str, torch.Tensor]]] = []

    def assign(self, tokens, k):
        self.told.append({**tokens.signals, "t": tokens.coords[None, :, 1].clone()})
        return (torch.arange(tokens.count) * k // tokens.count).expand(tokens.batch, -1)


def test_the_last_frame_of_a_window_is_held_whole() -> None:
    clip = frames(40)
    Quarters.told.clear()
    stream = fed(Quarters(), clip, budget=20, window=512)
    tokens = stream.tokens()
    assert tokens.count == 20
    assert float(tokens.sizes.sum()) == 640
    # What every token that ever came merged into is in a mean, and weighs what it should.
    mean = (tokens.features * tokens.sizes[..., None]).sum(1) / 640
    torch.testing.assert_close(mean[0], clip.flatten(0, 1).mean(0), rtol=1e-4, atol=1e-5)
    first, second = Quarters.told[:2]
    assert not first.keys() & {"former_groups", "seen_direction"}
    last = int(first["t"].max())
    frame = second["t"][0] == last
    assert int(frame.sum()) == 16
    # Its tokens that merged into others bear their numbers.
    numbers = second["former_groups"][0]
    assert numbers[frame].unique().numel() < 16
    so_far = clip[: int(second["t"].max()) + 1].flatten(0, 1)
    unit = torch.nn.functional.normalize(so_far, dim=1)
    torch.testing.assert_close(second["seen_direction"][0], unit.mean(0), rtol=1e-4, atol=1e-6)
