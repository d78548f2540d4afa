"""LFTR against a slow oracle in the notation of its card, and what its card promises."""

import math
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tokenreduce_strategies.lftr as module
from tokenreduce.errors import PipelineError, UnknownName
from tokenreduce.neighbors import exact
from tokenreduce.ops import tracks as ops_tracks
from tokenreduce.testing.cost import peak_growth
from tokenreduce.tokens import Layout, VisualTokens
from tokenreduce_strategies.lftr import LFTR


def oracle(features, frames, k, still=0.25, redundant=0.2, spare=1.5, sizes=None):
    """One item ``(N, D)`` of ``frames`` equal frames, in float64 and loops.

    Returns groups (lists of source tokens), by position.
    """
    x = np.asarray(features, np.float64)
    n = len(x)
    s = np.ones(n) if sizes is None else np.asarray(sizes, np.float64)
    members, place = [[i] for i in range(n)], n // frames

    def statistics(x, s):
        u = np.array([v / np.linalg.norm(v) for v in x])
        m = sum(s[i] * u[i] for i in range(len(u))) / s.sum()
        scale = 1 - m @ m

        def d(a, b):
            return (1 - a @ b) / scale

        return u, m, d

    if frames > 1:
        u, _, d = statistics(x, s)
        links = [(d(u[i], u[i - place]), i) for i in range(place, n)]
        links = sorted(link for link in links if link[0] <= still)[: n - k]
        follows = {i for _, i in links}
        members = []
        for i in range(n):
            if i in follows:
                next(tube for tube in members if tube[-1] == i - place).append(i)
            else:
                members.append([i])
        x = np.array([sum(s[i] * x[i] for i in tube) / s[tube].sum() for tube in members])
        s = np.array([s[tube].sum() for tube in members])

    u, m, d = statistics(x, s)
    n, count = len(u), min(len(u), math.ceil(spare * k))
    picks = [max(range(n), key=lambda i: (u[i] @ m, -i))]
    while len(picks) < count:
        owner = [min(picks, key=lambda r: d(u[i], u[r])) for i in range(n)]
        extent = {r: sum(s[i] for i in range(n) if owner[i] == r) for r in picks}
        apart = {i: d(u[i], u[owner[i]]) for i in range(n) if i not in picks}
        if max(apart.values()) <= redundant:
            if len(picks) >= k:
                break
            apart = {i: extent[owner[i]] * value for i, value in apart.items()}
        picks.append(max(apart, key=lambda i: (apart[i], -i)))
    picks.sort()

    def join(representatives):
        groups = {r: [r] for r in representatives}
        for i in set(range(n)) - set(representatives):
            r = min(representatives, key=lambda r: d(u[i], u[r]))
            if d(u[i], u[r]) <= redundant:
                groups[r].append(i)
        return groups

    groups = join(picks)
    size = {r: sum(s[i] for i in groups[r]) for r in picks}
    significance = {}
    for r in picks:
        larger = [q for q in picks if (size[q], -q) > (size[r], -r)]
        others = larger or picks
        apart = (min if larger else max)(d(u[r], u[q]) for q in others)
        unlike = d(u[r], m)
        significance[r] = size[r] * unlike * apart
    kept = sorted(sorted(picks, key=lambda r: (-significance[r], r))[:k])
    return {
        members[r][0]: sorted(i for tube in group for i in members[tube])
        for r, group in join(kept).items()
    }


def structured(frames, place, channels, clusters, noise, seed):
    """Clusters around an offset, with some change from frame to frame, ``(frames * place, D)``."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(clusters, channels)) + rng.normal(size=channels)
    which = rng.integers(clusters, size=place)
    still = centres[which] + noise * rng.normal(size=(place, channels))
    clip = np.repeat(still[None], frames, 0)
    moved = rng.random((frames, place)) < 0.3
    clip[moved] = centres[rng.integers(clusters, size=moved.sum())]
    clip += 0.1 * noise * rng.normal(size=clip.shape)
    return torch.tensor(clip.reshape(-1, channels), dtype=torch.float32)


def groups_of(reduction, item=0):
    """Members of each output, by position."""
    assignment = reduction.assignment[item].tolist()
    return {
        position: [i for i, group in enumerate(assignment) if group == output]
        for output, position in enumerate(reduction.positions[item].tolist())
    }


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(
    ("frames", "place", "k"), [(1, 40, 5), (1, 63, 16), (4, 15, 6), (3, 20, 30), (5, 12, 1)]
)
@pytest.mark.parametrize(
    "options", [{}, {"redundant": 0.5, "spare": 2.0}, {"still": 0.1, "redundant": 0.6}]
)
def test_equals_the_oracle(frames, place, k, options, seed):
    features = structured(frames, place, channels=16, clusters=7, noise=0.3, seed=seed)
    reducer = LFTR(keep=k, **options)
    reduction = reducer(VisualTokens.from_grid(features, (frames, 1, place)))
    expected = oracle(features, frames, k, **options)
    assert groups_of(reduction) == expected
    means = torch.stack([features[group].mean(0) for group in expected.values()])
    torch.testing.assert_close(reduction.features[0], means, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("frames", [1, 3])
def test_equals_the_oracle_with_sizes(frames):
    features = structured(frames, 24, channels=8, clusters=5, noise=0.3, seed=9)
    sizes = torch.arange(frames * 24).remainder(4).add(1).float()
    layout = Layout.from_grid((frames, 4, 6))
    reduction = LFTR(keep=6)(VisualTokens(features[None], layout, sizes=sizes[None]))
    expected = oracle(features, frames, 6, sizes=sizes.numpy())
    assert groups_of(reduction) == expected
    for output, group in enumerate(expected.values()):
        mean = (features[group] * sizes[group, None]).sum(0) / sizes[group].sum()
        torch.testing.assert_close(reduction.features[0, output], mean, rtol=1e-4, atol=1e-5)


grids = st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(1, 5))


@given(
    grid=grids,
    channels=st.integers(1, 6),
    share=st.floats(0.01, 1),
    distinct=st.integers(1, 12),
    blank=st.booleans(),
    runs=st.sampled_from([4, 4096]),
    seed=st.integers(0, 99),
)
@settings(max_examples=150, deadline=None)
def test_budget_is_exact_and_the_record_consistent(
    grid, channels, share, distinct, blank, runs, seed
):
    rng = torch.Generator().manual_seed(seed)
    n = math.prod(grid)
    values = torch.randn(distinct, channels, generator=rng)
    if blank:
        values[0] = 0
    features = values[torch.randint(distinct, (2, n), generator=rng)]
    k = max(1, math.ceil(share * n))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "RUN_TOKENS", runs)
        reduction = LFTR(keep=k)(VisualTokens.from_grid(features, grid))
        repeated = LFTR(keep=k)(VisualTokens.from_grid(features, grid))
    assert reduction.kept == min(k, n)
    assert torch.equal(reduction.assignment, repeated.assignment)
    assert bool((reduction.positions.diff(dim=1) > 0).all())
    own = reduction.assignment.gather(1, reduction.positions)
    assert torch.equal(own, torch.arange(reduction.kept).expand(2, -1))
    assert bool(reduction.features.isfinite().all())
    # A merged token lies within the range of its sources.
    assert bool((reduction.features.amax(1) <= features.amax(1) + 1e-5).all())


@given(grid=grids, k=st.integers(1, 8), seed=st.integers(0, 99))
@settings(max_examples=50, deadline=None)
def test_an_item_is_reduced_alike_alone_and_in_a_batch(grid, k, seed):
    rng = torch.Generator().manual_seed(seed)
    features = torch.randn(5, math.prod(grid), 9, generator=rng)
    features[3] = features[1]
    reducer = LFTR(keep=k)
    together = reducer(VisualTokens.from_grid(features, grid))
    assert torch.equal(together.assignment[1], together.assignment[3])
    for item in range(5):
        alone = reducer(VisualTokens.from_grid(features[item], grid))
        assert torch.equal(alone.assignment[0], together.assignment[item])
        torch.testing.assert_close(alone.features[0], together.features[item])


@pytest.mark.parametrize("value", [0.0, 1.0, -3.0])
@pytest.mark.parametrize("grid", [(1, 30), (3, 2, 5)])
def test_equal_tokens_go_to_the_lowest_index(value, grid):
    features = torch.full((2, math.prod(grid), 16), value) * torch.linspace(0.5, 1, 16)
    reduction = LFTR(keep=4)(VisualTokens.from_grid(features, grid))
    assert reduction.positions.tolist() == [[0, 1, 2, 3]] * 2
    assert int((reduction.assignment < 0).sum()) == 0
    torch.testing.assert_close(reduction.features, features[:, :4])


def test_scale_and_channel_order_do_not_matter():
    features = structured(3, 20, channels=16, clusters=6, noise=0.3, seed=3)
    reducer, grid = LFTR(keep=9), (3, 4, 5)
    base = reducer(VisualTokens.from_grid(features, grid))
    for other in (features * 512, features / 4096, features[:, torch.randperm(16)]):
        assert torch.equal(reducer(VisualTokens.from_grid(other, grid)).assignment, base.assignment)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("grid", [(6, 10), (3, 4, 5)])
def test_half_precision_decides_as_float32(dtype, grid):
    frames = grid[0] if len(grid) == 3 else 1
    features = structured(frames, 60 // frames, channels=64, clusters=8, noise=0.3, seed=5)
    features = (300 * features).to(dtype)
    reducer = LFTR(keep=8)
    half = reducer(VisualTokens.from_grid(features, grid))
    full = reducer(VisualTokens.from_grid(features.float(), grid))
    assert half.features.dtype == dtype
    assert torch.equal(half.assignment, full.assignment)
    torch.testing.assert_close(half.features, full.features.to(dtype))


def moving_object_clip():
    """Six frames of 6 x 6: four background textures, and a 1 x 2 object that crosses row 2."""
    rng = torch.Generator().manual_seed(0)
    textures = torch.randn(4, 32, generator=rng)
    background = textures.repeat_interleave(9, 0)
    clip = background.repeat(6, 1, 1) + 0.02 * torch.randn(6, 36, 32, generator=rng)
    mover = torch.randn(32, generator=rng)
    track = [[12 + t, 13 + t] for t in range(5)] + [[17]]
    for frame, places in enumerate(track):
        clip[frame, places] = mover + 0.02 * torch.randn(len(places), 32, generator=rng)
    on_track = torch.tensor([36 * t + place for t, places in enumerate(track) for place in places])
    return clip.reshape(1, 216, 32), on_track, mover


def test_a_moving_object_survives_while_the_background_merges_in_time():
    features, on_track, mover = moving_object_clip()
    tokens = VisualTokens.from_grid(features, (6, 6, 6))
    reduction = LFTR(reduction=8)(tokens)
    assert reduction.kept == 27
    owners = {reduction.assignment[0, i].item() for i in on_track}
    similarity = torch.cosine_similarity(reduction.features[0], mover[None])
    assert max(similarity[owner] for owner in owners if owner >= 0) > 0.99
    # Places that the object never crosses are the same token in every frame.
    still = [place for place in range(36) if place // 6 != 2]
    through_time = reduction.assignment[0].reshape(6, 36)[:, still]
    assert torch.equal(through_time, through_time[:1].expand(6, -1))
    # The object is one of five contents and stays at 54x.
    few = LFTR(keep=5)(tokens)
    similarity = torch.cosine_similarity(few.features[0], mover[None])
    assert int((similarity > 0.99).sum()) == 1


def test_time_takes_no_more_than_the_budget_asks_for():
    rng = torch.Generator().manual_seed(1)
    features = torch.randn(1, 20, 8, generator=rng).repeat(1, 5, 1)
    reduction = LFTR(keep=60)(VisualTokens.from_grid(features, (5, 4, 5)))
    assert reduction.kept == 60
    assert int((reduction.assignment < 0).sum()) == 0
    torch.testing.assert_close(reduction.features, features[0][reduction.positions])


def test_only_neighbouring_frames_are_linked():
    same = torch.randn(1, 1, 8, generator=torch.Generator().manual_seed(2))
    other = torch.randn(1, 1, 8, generator=torch.Generator().manual_seed(3))
    # A token that comes back after another frame is not linked across it.
    clip = torch.cat([same, other, same], dim=1)
    reduction = LFTR(keep=2, spare=1.0)(VisualTokens.from_grid(clip, (3, 1, 1)))
    assert reduction.assignment.tolist() == [[0, 1, 0]]


def long_oracle(features, frames, k, still=0.25, redundant=0.2):
    """Steps 1, 2' and 3' of the card for one item of equal frames, in float64 and loops."""
    x = np.asarray(features, np.float64)
    n, place = len(x), len(x) // frames
    u = np.array([v / np.linalg.norm(v) for v in x])
    m = u.mean(0)
    scale = 1 - m @ m

    def d(a, b):
        return (1 - u[a] @ u[b]) / scale

    links = [(d(i, i - place), i) for i in range(place, n)]
    follows = {i for _, i in sorted(link for link in links if link[0] <= still)[: n - k]}
    tube = {}
    for i in range(n):
        tube[i] = tube[i - place] if i in follows else i
    heads = sorted(set(tube.values()))
    extent = {h: sum(owner == h for owner in tube.values()) for h in heads}
    link = {h: min(heads[:r], key=lambda e: d(h, e)) for r, h in enumerate(heads) if r}
    novelty = {h: d(h, e) for h, e in link.items()} | {heads[0]: 2 / scale}
    alone = [h for h in heads if novelty[h] > redundant]

    def end(h, ends):
        while h not in ends:
            h = link[h]
        return h

    score = novelty
    if len(alone) > k:
        size = dict.fromkeys(alone, 0)
        for h in heads:
            last = end(h, alone)
            if h == last or d(h, last) <= redundant:
                size[last] += extent[h]
        score = {h: size[h] * novelty[h] * (1 - u[h] @ m) / scale for h in alone}
    kept = sorted(sorted(score, key=lambda h: (-score[h], h))[:k])
    groups = {h: [] for h in kept}
    for i in range(n):
        h = tube[i]
        last = end(h, {*kept, *alone})
        if last in groups and (h == last or d(h, last) <= redundant):
            groups[last].append(i)
    return groups


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    ("frames", "place", "k"), [(1, 90, 7), (1, 60, 40), (6, 20, 5), (6, 20, 40)]
)
@pytest.mark.parametrize("redundant", [0.3, 0.6])
def test_long_items_equal_their_oracle(monkeypatch, frames, place, k, redundant, seed):
    monkeypatch.setattr(module, "RUN_TOKENS", 16)
    features = structured(frames, place, channels=16, clusters=12, noise=0.3, seed=seed)
    reducer = LFTR(keep=k, redundant=redundant, neighbors="torch")
    reduction = reducer(VisualTokens.from_grid(features, (frames, 1, place)))
    expected = long_oracle(features, frames, k, redundant=redundant)
    assert groups_of(reduction) == expected
    means = torch.stack([features[group].mean(0) for group in expected.values()])
    torch.testing.assert_close(reduction.features[0], means, rtol=1e-4, atol=1e-5)


def test_tiles_of_a_long_item_change_nothing(monkeypatch):
    monkeypatch.setattr(module, "RUN_TOKENS", 64)
    features = structured(20, 30, channels=16, clusters=30, noise=0.4, seed=4)
    tokens = VisualTokens.from_grid(features, (20, 5, 6))
    whole = LFTR(reduction=8, neighbors="torch")(tokens)
    monkeypatch.setattr(exact, "TILE_ROWS", 17)
    monkeypatch.setattr(ops_tracks, "PART_TOKENS", 13)
    tiled = LFTR(reduction=8, neighbors="torch")(tokens)
    assert tiled.assignment.equal(whole.assignment)
    torch.testing.assert_close(tiled.features, whole.features)


def test_a_long_item_in_half_precision(monkeypatch):
    monkeypatch.setattr(module, "RUN_TOKENS", 32)
    features = structured(8, 30, channels=64, clusters=9, noise=0.3, seed=5).bfloat16()
    reducer = LFTR(keep=40, neighbors="torch")
    half = reducer(VisualTokens.from_grid(features, (8, 5, 6)))
    full = reducer(VisualTokens.from_grid(features.float(), (8, 5, 6)))
    assert half.assignment.equal(full.assignment)


def test_content_that_returns_after_long_is_the_same_token(monkeypatch):
    monkeypatch.setattr(module, "RUN_TOKENS", 16)
    rng = torch.Generator().manual_seed(0)
    shots = torch.randn(3, 1, 12, 32, generator=rng).expand(-1, 4, -1, -1)
    clip = torch.cat([shots[0], shots[1], shots[2], shots[0]])
    reduction = LFTR(keep=36)(VisualTokens.from_grid(clip.reshape(1, -1, 32), (16, 3, 4)))
    frames = reduction.assignment.view(16, 12)
    assert frames[12:].equal(frames[:1].expand(4, -1))
    assert reduction.positions[0].tolist() == [*range(12), *range(48, 60), *range(96, 108)]


@pytest.mark.parametrize(
    "options",
    [{"redundant": -0.1}, {"redundant": 1.5}, {"still": math.nan}, {"spare": 0.5}],
)
def test_options_out_of_range_are_refused(options):
    with pytest.raises(PipelineError, match=next(iter(options))):
        LFTR(keep=4, **options)


def test_an_unknown_neighbour_backend_is_refused():
    with pytest.raises(UnknownName, match="Did you mean"):
        LFTR(keep=4, neighbors="torhc")


def test_a_stream_keeps_what_the_batch_keeps(monkeypatch):
    monkeypatch.setattr(module, "RUN_TOKENS", 64)
    features = structured(80, 36, channels=48, clusters=60, noise=0.3, seed=8)
    reducer = LFTR(keep=180, neighbors="torch")
    batch = reducer(VisualTokens.from_grid(features, (80, 6, 6)))
    stream = reducer.stream(budget=180, window=400)
    for frame in features.view(80, 36, 48):
        stream.feed(frame, (6, 6))
    shared = set(stream.positions().tolist()) & set(batch.positions[0].tolist())
    # Noise decides among tokens of one cluster here; on clips with motion it is 0.95.
    assert len(shared) >= 0.7 * 180
    kept = int((batch.assignment >= 0).sum())
    assert float(stream.tokens().sizes.sum()) >= 0.9 * kept


def test_few_tokens_that_stand_for_many_are_linked(monkeypatch):
    monkeypatch.setattr(module, "RUN_TOKENS", 64)
    features = structured(1, 40, channels=16, clusters=20, noise=0.3, seed=9)
    reducer, coords = LFTR(keep=10, neighbors="torch"), Layout.from_grid((5, 8))
    assert reducer(VisualTokens(features[None], coords)).scores is None
    many = VisualTokens(features[None], coords, sizes=torch.full((1, 40), 2.0))
    scores = reducer(many).scores
    assert not bool(scores.isnan().any())
    # What is remembered of a token counts, where it is less than what is found now.
    known = VisualTokens(
        features[None],
        coords,
        sizes=many.sizes,
        signals={"former_scores": torch.where(torch.arange(40) < 20, 0.5 * scores, torch.nan)},
    )
    again = reducer(known).scores
    torch.testing.assert_close(again[:, :20], 0.5 * scores[:, :20], rtol=1e-3, atol=1e-5)
    assert again[:, 20:].equal(scores[:, 20:])


def long_clip(frames, side, channels, seed):
    """The clip of the benchmark."""
    path = Path(__file__).parents[2] / "benchmarks" / "synthetic_clip.py"
    clip = runpy.run_path(str(path))["SyntheticClip"]
    return torch.stack(list(clip(frames, side=side, channels=channels, seed=seed)))


def share_kept(clip, k, window):
    """Share of what LFTR keeps of a clip ``(T, H * W, D)`` that a stream of it keeps too."""
    frames, place, channels = clip.shape
    side = math.isqrt(place)
    reducer = LFTR(keep=k, neighbors="torch")
    whole = VisualTokens.from_grid(clip.view(-1, channels), (frames, side, side))
    batch = set(reducer(whole).positions[0].tolist())
    stream = reducer.stream(budget=k, window=window)
    for frame in clip:
        stream.feed(frame, (side, side))
    return len(batch & set(stream.positions().tolist())) / k


@pytest.mark.parametrize(
    ("window", "least"), [(900, (0.9, 0.8, 0.7)), (1800, (0.94, 0.91, 0.9)), (3600, 3 * (0.95,))]
)
def test_what_a_stream_keeps_depends_little_on_its_window(monkeypatch, window, least):
    """Windows of an eighth, a quarter and half of a clip; 8x, 16x and 32x."""
    monkeypatch.setattr(module, "RUN_TOKENS", 256)
    clip = long_clip(200, 6, 64, seed=5)
    for reduction, share in zip((8, 16, 32), least, strict=True):
        assert share_kept(clip, 7200 // reduction, window) >= share


def stated():
    """Least shares by window and reduction, as docs/long_video.md states them."""
    page = (Path(__file__).parents[2] / "docs" / "long_video.md").read_text(encoding="utf-8")
    table = page.partition("| window | 8x | 16x | 32x | 64x |")[2].partition("\n\n")[0]
    rows = [row.strip("| ").split(" | ") for row in table.splitlines()[2:]]
    return {
        (int(window.replace(",", "")), 8 << place): float(share)
        for window, *shares in rows
        for place, share in enumerate(shares)
    }


@pytest.mark.slow
@pytest.mark.parametrize("seed", [201, 202])
@pytest.mark.parametrize("reduction", [8, 16, 32, 64])
def test_a_long_stream_keeps_what_the_page_states(seed, reduction):
    clip, windows = long_clip(256, 16, 1024, seed), [4096, 8192, 16384, 32768]
    shares = {window: share_kept(clip, 65_536 // reduction, window) for window in windows}
    least = stated()
    assert {w: share for w, share in shares.items() if share < least[w, reduction]} == {}


def test_a_stream_needs_memory_for_two_budgets_and_its_window():
    channels, budget, window = 512, 2048, 8192
    clip = long_clip(80, 16, channels, seed=3)

    def feed():
        stream = LFTR(neighbors="torch").stream(budget=budget, window=window)
        for number, frame in enumerate(clip):
            stream.feed(frame, (16, 16))
            if number % 32 == 31:
                stream.tokens()

    grown = peak_growth(feed)
    assert grown is None or grown < (2 * budget + window) * 4 * channels
