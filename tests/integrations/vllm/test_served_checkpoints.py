"""The tiny checkpoints are whole: transformers loads each and puts its images in their place."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from support import served_checkpoints
from support.served_checkpoints import BOS, FAMILIES, FIRST_BYTE, picture
from support.tiny_models import IMAGE

QUESTION = "what?"


@pytest.mark.parametrize("name", FAMILIES)
def test_transformers_reads_what_was_saved(name: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    folder = served_checkpoints.save(name, tmp_path / name)
    model, found = transformers.AutoModelForImageTextToText.from_pretrained(
        folder, output_loading_info=True, dtype=torch.float32
    )
    assert not any(found.values())
    processor = transformers.AutoProcessor.from_pretrained(folder)
    content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
    )
    assert prompt == family.prompt(QUESTION, images=1)
    inputs = processor(images=[picture(1)], text=[prompt], return_tensors="pt")
    ids = inputs["input_ids"][0]
    assert (ids == IMAGE).sum() > 16
    assert BOS not in ids
    # Every byte of text is a token, and the rest stands for the image.
    text = prompt.replace(family.image, "")
    assert (ids >= FIRST_BYTE).sum() == len(text)
    assert model(**inputs).logits.isfinite().all()
