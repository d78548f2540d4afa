"""A model whose code ships with it: the adapter's contract, and a pipeline from YAML."""

import copy

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

import tokenreduce as tr
from tokenreduce.attachment import find_adapter
from tokenreduce.errors import PipelineError, UnsupportedSite
from tokenreduce.testing import run_adapter_checks
from tokenreduce.testing.adapters import ADAPTER_CHECKS

PICTURE = np.random.default_rng(0).integers(0, 255, (42, 56, 3), dtype=np.uint8)


@pytest.fixture(scope="session")
def model(folder):
    found = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
    return found.eval()


def example_inputs():
    pixels = torch.randn(1, 3, 42, 56, generator=torch.Generator().manual_seed(1))
    return {"input_ids": torch.tensor([[1, 4, *[3] * 12, 5, 6, 7]]), "pixel_values": pixels}


@pytest.fixture(scope="session")
def results(model):
    found = run_adapter_checks(
        "pebble", lambda: copy.deepcopy(model), example_inputs, grids=((1, 3, 4),)
    )
    return {result.check: result for result in found}


@pytest.mark.parametrize("check", ADAPTER_CHECKS)
def test_conformance(results, check):
    assert results[check].outcome == "passed", results[check].detail


def test_the_class_is_not_one_of_transformers(model):
    assert type(model).__module__.startswith("transformers_modules.")
    assert type(find_adapter(model)).__name__ == "PebbleAdapter"


def test_the_processor_counts_patches(folder):
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    inputs = processor(images=PICTURE, text="<image> what is this ?")
    assert (inputs["input_ids"] == 3).sum() == 12
    assert inputs["pixel_values"].shape == (1, 3, 42, 56)


@pytest.mark.parametrize("strategy", ["divprune", "tome", "lftr"])
def test_a_pipeline_from_yaml(folder, tmp_path, strategy):
    text = f"""
model: {{path: "{folder}", adapter: pebble, device: cpu}}
reduce:
  - {{strategy: {strategy}, keep: 3}}
"""
    (tmp_path / "pebble.yaml").write_text(text)
    model, processor, run = tr.load_pipeline(tmp_path / "pebble.yaml").build()
    inputs = processor(images=PICTURE, text="<image> what is this ?")
    with run:
        answer = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert answer.shape == (1, inputs["input_ids"].shape[1] + 4)
    assert (run.receipt.tokens_in, run.receipt.tokens_out) == (12, 3)


def test_stages_inside_the_llm(model):
    stage = tr.Stage(reducer=tr.create_strategy("fastv", keep=4), site="decoder", layer=1)
    with tr.attach(model, stage) as run, torch.no_grad():
        model(**example_inputs())
    assert run.receipt.tokens_per_layer == (12, 4, 4)


def test_what_is_not_known_is_refused(folder, model):
    inside = tr.Stage(reducer=tr.create_strategy("tome", keep=4), site="vision", layer=1)
    with pytest.raises(UnsupportedSite, match="Pebble"):
        tr.attach(model, inside)
    for settings, message in (
        ({"path": "someone/pebble-vl"}, "no such folder"),
        ({"path": str(folder), "attention": "sdpa"}, r"model\.attention"),
    ):
        pipeline = {"model": {"adapter": "pebble", **settings}, "reduce": [{"strategy": "lftr"}]}
        pipeline["reduce"][0]["keep"] = 3
        with pytest.raises(PipelineError, match=message):
            tr.load_pipeline(pipeline).build()
