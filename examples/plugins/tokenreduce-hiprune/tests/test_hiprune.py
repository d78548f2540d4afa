"""HiPrune: the contract, the authors' picks, and a plain loop."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from tokenreduce_hiprune.hiprune import HiPrune

from tokenreduce import VisualTokens, create_strategy
from tokenreduce.errors import PipelineError
from tokenreduce.testing import parametrize_checks

CASES = sorted((Path(__file__).parent / "parity").glob("*.safetensors"))


@parametrize_checks("hiprune")
def test_conformance(check):
    check()


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_picks_equal_those_of_the_authors(path):
    with safe_open(path, "pt") as case:
        parameters = json.loads(case.metadata()["parameters"])
        objects, deep = case.get_tensor("in.objects"), case.get_tensor("in.received_attention")
        expected = case.get_tensor("out.kept_indices_sorted")
    signals = {"shallow_class_attention": objects[None], "received_attention": deep[None]}
    tokens = VisualTokens.from_grid(torch.randn(1, 576, 4), (24, 24), signals=signals)
    reducer = HiPrune(keep=parameters["keep"], alpha=parameters["alpha"], official=True)
    assert torch.equal(reducer(tokens).positions[0], expected)


def test_there_are_cases():
    assert len(CASES) == 3


def slow(objects, deep, grid, k, alpha):
    """As the card says it, token by token."""
    _, height, width = grid
    by_objects = sorted(range(len(objects)), key=lambda i: (-objects[i], i))
    anchors = set(by_objects[: round(alpha * k / 5)])
    buffers = set()
    for anchor in anchors:
        t, y, x = anchor // (height * width), anchor // width % height, anchor % width
        for dy, dx in ((-1, 0), (1, 0), (0, -1), (0, 1)):
            if 0 <= y + dy < height and 0 <= x + dx < width:
                buffers.add((t * height + y + dy) * width + x + dx)
    by_deep = sorted(range(len(deep)), key=lambda i: (-deep[i], i))
    chosen = [i for i in by_deep if i in anchors]
    chosen += [i for i in by_deep if i in buffers - anchors]
    chosen += [i for i in by_deep if i not in anchors | buffers]
    return sorted(chosen[:k])


@pytest.mark.parametrize("grid", [(1, 6, 8), (3, 4, 4), (1, 1, 12)])
@pytest.mark.parametrize(("k", "alpha"), [(1, 1.0), (3, 1.0), (9, 0.1), (9, 0.9), (10, 0.0)])
def test_equals_a_plain_loop(grid, k, alpha):
    generator = torch.Generator().manual_seed(k)
    count = grid[0] * grid[1] * grid[2]
    # Few different values, so that ties decide too.
    objects = torch.randint(0, 9, (2, count), generator=generator).float()
    deep = torch.randint(0, 9, (2, count), generator=generator).float()
    signals = {"shallow_class_attention": objects, "received_attention": deep}
    tokens = VisualTokens.from_grid(torch.randn(2, count, 4), grid, signals=signals)
    kept = HiPrune(keep=k, alpha=alpha)(tokens).positions
    for b in range(2):
        expected = slow(objects[b].tolist(), deep[b].tolist(), grid, k, alpha)
        assert kept[b].tolist() == expected


def test_another_signal_can_tell_objects():
    generator = torch.Generator().manual_seed(0)
    signals = {
        name: torch.rand(1, 30, generator=generator)
        for name in ("class_attention", "received_attention")
    }
    tokens = VisualTokens.from_grid(torch.randn(1, 30, 4), (5, 6), signals=signals)
    reducer = create_strategy("hiprune", keep=10, alpha=0.5, objects="class_attention")
    assert reducer.needs == ("received_attention", "class_attention")
    assert int(signals["class_attention"].argmax()) in reducer(tokens).positions[0].tolist()


def test_alpha_is_a_share():
    with pytest.raises(PipelineError, match=r"alpha=1\.5 must lie in \[0, 1\]"):
        HiPrune(keep=10, alpha=1.5)


def test_it_answers_on_the_testbed():
    import tokenreduce as tr
    from tokenreduce_integrations import testbed

    reduce = [{"strategy": "hiprune", "reduction": 8}]
    model = {"path": "testbed:b", "device": "cpu", "dtype": "float32"}
    model, processor, run = tr.load_pipeline({"model": model, "reduce": reduce}).build()
    inputs = processor(
        images=testbed.example_image(),
        text=testbed.prompt("what digit is shown ?"),
        return_tensors="pt",
    )
    with run:
        model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert (run.receipt.tokens_in, run.receipt.tokens_out) == (144, 18)
