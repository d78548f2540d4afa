"""Checkpoints are read as the hub has them, and as transformers 5 writes them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from support import served_checkpoints
from tokenreduce_integrations.vllm.families import FAMILIES, PREFIX

WEIGHTS = "model.safetensors"


@pytest.mark.parametrize("name", served_checkpoints.FAMILIES)
def test_weights_get_the_names_of_the_hub(name: str, tmp_path: Path) -> None:
    folder = served_checkpoints.save(name, tmp_path)
    [architecture] = json.loads((folder / "config.json").read_text())["architectures"]
    family = FAMILIES[PREFIX + architecture]
    ours, hub = served_checkpoints.FAMILIES[name].renamed
    for stored in load_file(folder / WEIGHTS):
        assert family.weight_name(stored) == stored
        assert family.weight_name(stored.replace(hub, ours) if hub else stored) == stored


@pytest.mark.vllm
@pytest.mark.filterwarnings("ignore")
def test_both_answer_alike(tmp_path: Path) -> None:
    from support.served_engines import answers, engine, overrides, requests

    name = "llava"
    folder = served_checkpoints.save(name, tmp_path)
    reduced = overrides(name, strategy="divprune", reduction=4)
    with engine(folder, hf_overrides=reduced) as llm:
        expected = answers(llm, requests(name))
    ours, hub = served_checkpoints.FAMILIES[name].renamed
    weights = {key.replace(hub, ours): value for key, value in load_file(folder / WEIGHTS).items()}
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    with engine(folder, hf_overrides=reduced) as llm:
        assert answers(llm, requests(name)) == expected
