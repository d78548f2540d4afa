"""Trees in time, against the definition."""

import pytest
import torch

from tokenreduce.ops import temporal_trees
from tokenreduce.ops.temporal_trees import nearest_in_frame_before, tree_means, tree_roots


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("entries", [1, 1 << 19])
def test_the_most_similar_token_of_the_frame_before(monkeypatch, entries):
    monkeypatch.setattr(temporal_trees, "TILE_ENTRIES", entries)
    frames, takes = draw(4, 7, 5), draw(4, 7, seed=1) > -0.5
    takes[1] = False
    place, cosine = nearest_in_frame_before(frames, takes)
    for t in range(1, 4):
        for p in range(7):
            each = [
                float(torch.cosine_similarity(frames[t, p], frames[t - 1, q], dim=0))
                if takes[t - 1, q]
                else -1.0
                for q in range(7)
            ]
            assert cosine[t - 1, p].item() == pytest.approx(max(each), abs=1e-6)
            assert each[place[t - 1, p]] == max(each)


def test_one_frame_leans_on_nothing():
    place, cosine = nearest_in_frame_before(draw(1, 3, 2), torch.ones(1, 3, dtype=torch.bool))
    assert place.shape == cosine.shape == (0, 3)


def test_roots_are_found_through_all_frames():
    place = torch.tensor([[1, 1, 0], [2, 0, 1]])
    linked = torch.tensor([[True, False, True], [True, True, True]])
    assert tree_roots(place, linked).tolist() == [0, 1, 2, 1, 4, 0, 0, 1, 4]


def test_means_stand_where_trees_begin():
    frames = draw(3, 2, 4)
    # Tokens 0, 2 and 5 are one tree; 1, 3 and 4 are trees of their own.
    roots = torch.tensor([0, 1, 0, 3, 4, 0])
    members = torch.bincount(roots, minlength=6).float()
    means = tree_means(frames, roots, members, torch.tensor([True, False, True]))
    flat = frames.flatten(0, 1)
    torch.testing.assert_close(means[0], torch.stack([flat[[0, 2, 5]].mean(0), flat[1]]))
    torch.testing.assert_close(means[1], torch.stack([flat[4], torch.zeros(4)]))
