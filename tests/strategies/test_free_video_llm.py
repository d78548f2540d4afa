"""Free Video-LLM: frames and regions, by definition."""

import pytest
import torch

from tokenreduce import VisualTokens
from tokenreduce.errors import PipelineError
from tokenreduce_strategies.free_video_llm import FreeVideoLLM, region_boxes


def clip(frames=8, height=6, width=8):
    generator = torch.Generator().manual_seed(0)
    n = frames * height * width
    joint = torch.randn(1, n, 5, generator=generator).cumsum(1) / 5
    signals = {
        "joint_image_embeddings": joint,
        "joint_text_embeddings": torch.randn(1, 2, 5, generator=generator),
    }
    x = torch.randn(1, n, 4, generator=generator)
    return VisualTokens.from_grid(x, (frames, height, width), signals=signals)


def test_boxes_stay_inside():
    points = torch.tensor([[0], [59], [25]])
    boxes = region_boxes(points, 6, 10, 0.25)
    assert (boxes.left.tolist(), boxes.right.tolist()) == ([0, 5, 3], [5, 10, 8])
    assert (boxes.top.tolist(), boxes.bottom.tolist()) == ([0, 3, 1], [3, 6, 4])


def test_frames():
    similarity = torch.tensor([[0.1, 0.9, 0.2, 0.3, 0.8, 0.0, 0.4, 0.5]])
    # Two by similarity, 1 and 4, two evenly among 0, 2, 3, 5, 6, 7.
    chosen = FreeVideoLLM.frames(similarity, 4)[0]
    assert chosen.nonzero().flatten().tolist() == [1, 2, 4, 6]
    assert FreeVideoLLM.frames(similarity, 8).all()
    assert FreeVideoLLM.frames(similarity, 1)[0].nonzero().flatten().tolist() == [1]


@pytest.mark.parametrize("k", [3, 30, 100, 380])
def test_regions_of_chosen_frames_come_first(k):
    tokens = clip()
    joint = tokens.signal("joint_image_embeddings")[0].unflatten(0, (8, 48))
    text = tokens.signal("joint_text_embeddings")[0].mean(0)
    score = torch.nn.functional.cosine_similarity(joint, text[None, None], dim=2)
    points = score.topk(5).indices
    boxes = region_boxes(points, 6, 8, min(0.3, k / 48))
    cosine = torch.nn.functional.cosine_similarity(joint.mean(1), text[None], dim=1)
    area = int((boxes.right - boxes.left)[0] * (boxes.bottom - boxes.top)[0])
    shown = FreeVideoLLM.frames(cosine[None], min(8, -(-k // area)))[0]

    def inside(i):
        t, y, x = i // 48, i % 48 // 8, i % 8
        return (
            bool(shown[t])
            and boxes.left[t] <= x < boxes.right[t]
            and boxes.top[t] <= y < boxes.bottom[t]
        )

    flat = score.flatten().tolist()
    order = sorted(range(384), key=lambda i: (not inside(i), -flat[i], i))
    kept = FreeVideoLLM(keep=k, area=0.3, points=0.1)(tokens).positions[0]
    assert kept.tolist() == sorted(order[:k])


@pytest.mark.parametrize("options", [{"area": 0.0}, {"points": 1.5}])
def test_options(options):
    with pytest.raises(PipelineError):
        FreeVideoLLM(**options)
