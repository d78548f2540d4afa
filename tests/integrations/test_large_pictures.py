"""Pictures of thousands of pixels a side: native grids and sets of tiles, from file to answer."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from PIL import Image
from typer.testing import CliRunner

import tokenreduce as tr
from support.clip_models import PLAIN, tokenizer
from support.tiny_models import CLIP, IMAGE, QWEN_TOKENS, ROPE, TEXT, lively
from tokenreduce.errors import PipelineError
from tokenreduce_integrations.cli import chat
from tokenreduce_integrations.cli.app import app
from tokenreduce_integrations.transformers.resolution import limit_pixels

QUESTION = "what moves here"
LLM = {**TEXT, "num_hidden_layers": 2}
NATIVE = {"num_heads": 2, "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2}
#: Side of a tile, and what a tile becomes, of LLaVA-NeXT and InternVL as they are released.
TILE, NEXT_TOKENS, INTERN_TOKENS = {"llava-next": 336, "internvl": 448}, 24 * 24, 256
#: Seconds of processor time of it all and of choosing, and bytes at the peak.
CHILD = """
import resource, sys, time
from tokenreduce.reducer import Reducer
chosen = 0.0
reduce = Reducer.__call__
def timed(self, tokens):
    global chosen
    start = time.process_time()
    try:
        return reduce(self, tokens)
    finally:
        chosen += time.process_time() - start
Reducer.__call__ = timed
from tokenreduce_integrations.cli.app import app
app(sys.argv[1:], standalone_mode=False)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(time.process_time(), chosen, peak, file=sys.stderr)
"""


def save(folder: Path, config: Any, processor: Callable[..., Any], images: Any, **own: Any) -> Path:
    """Files of a model of random weights and its processor."""
    [kind] = config.architectures
    lively(getattr(transformers, kind)(config)).save_pretrained(folder)
    words = tokenizer()
    processor(image_processor=images, tokenizer=words, chat_template=PLAIN, **own).save_pretrained(
        folder
    )
    return folder


def qwen2_5_vl(folder: Path) -> Path:
    """Attention within windows of 112 pixels in all blocks."""
    config = transformers.Qwen2_5_VLConfig(
        architectures=["Qwen2_5_VLForConditionalGeneration"],
        vision_config={
            **NATIVE,
            "depth": 2,
            "hidden_size": 32,
            "out_hidden_size": 64,
            "intermediate_size": 48,
            "window_size": 112,
            "fullatt_block_indexes": [],
        },
        text_config={"rope_parameters": ROPE, **LLM},
        **QWEN_TOKENS,
    )
    return _native(folder, config, transformers.Qwen2_5_VLProcessor)


def qwen2_vl(folder: Path) -> Path:
    """Each patch attends to all others of its picture."""
    config = transformers.Qwen2VLConfig(
        architectures=["Qwen2VLForConditionalGeneration"],
        vision_config={**NATIVE, "depth": 1, "embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2},
        text_config={"rope_parameters": ROPE, **LLM},
        **QWEN_TOKENS,
    )
    return _native(folder, config, transformers.Qwen2VLProcessor)


def _native(folder: Path, config: Any, processor: Any) -> Path:
    images = transformers.Qwen2VLImageProcessor()
    return save(
        folder, config, processor, images, video_processor=transformers.Qwen2VLVideoProcessor()
    )


def llava_next(folder: Path) -> Path:
    """36 tiles and the whole picture: 6 x 6 is the largest set of LLaVA's family."""
    side = TILE["llava-next"]
    config = transformers.LlavaNextConfig(
        architectures=["LlavaNextForConditionalGeneration"],
        vision_config={**CLIP, "image_size": side, "num_hidden_layers": 2},
        text_config={"model_type": "llama", **LLM},
        image_token_index=IMAGE,
        image_grid_pinpoints=[[side, 2 * side], [6 * side, 6 * side]],
    )
    images = transformers.LlavaNextImageProcessor(
        size={"shortest_edge": side},
        crop_size={"height": side, "width": side},
        image_grid_pinpoints=config.image_grid_pinpoints,
    )
    return save(
        folder,
        config,
        transformers.LlavaNextProcessor,
        images,
        patch_size=14,
        num_additional_image_tokens=1,
        vision_feature_select_strategy="default",
    )


def internvl(folder: Path) -> Path:
    """12 tiles and the whole picture."""
    side = TILE["internvl"]
    config = transformers.InternVLConfig(
        architectures=["InternVLForConditionalGeneration"],
        vision_config={
            "hidden_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 48,
            "image_size": [side, side],
            "patch_size": [14, 14],
        },
        text_config={"model_type": "qwen2", **LLM},
        image_token_id=IMAGE,
        image_seq_length=INTERN_TOKENS,
        tie_word_embeddings=False,
    )
    images = transformers.GotOcr2ImageProcessor(
        size={"height": side, "width": side}, crop_to_patches=True, max_patches=12
    )
    video = transformers.InternVLVideoProcessor()
    return save(
        folder,
        config,
        transformers.InternVLProcessor,
        images,
        image_seq_length=INTERN_TOKENS,
        video_processor=video,
    )


MODELS: dict[str, Callable[[Path], Path]] = {
    "qwen2.5-vl": qwen2_5_vl,
    "qwen2-vl": qwen2_vl,
    "llava-next": llava_next,
    "internvl": internvl,
}


def expected_tokens(name: str, side: int) -> int:
    """Of a square picture."""
    if name == "llava-next":
        mosaic = 6 * 24
        return NEXT_TOKENS + mosaic * (mosaic + 1)
    if name == "internvl":
        # Of the shapes of twelve tiles at most, 3 x 3 is the largest that is as square.
        return (9 + 1) * INTERN_TOKENS
    return round(side / 28) ** 2


@pytest.fixture(scope="module")
def model_files(tmp_path_factory) -> Callable[[str], Path]:
    @functools.cache
    def made(name: str) -> Path:
        return MODELS[name](tmp_path_factory.mktemp(name))

    return made


def picture(folder: Path, side: int) -> Path:
    """Soft patches of colour; no two places are alike."""
    coarse = np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)
    path = folder / "picture.png"
    Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC).save(
        path, compress_level=1
    )
    return path


def pipeline_file(folder: Path, model: Path, name: str, keep: int, **options: Any) -> Path:
    settings = {"path": str(model)}
    if name.startswith("qwen"):
        settings["max_pixels"] = 10**8
    stage = {"strategy": "lftr", "keep": keep, **options}
    path = folder / "pipeline.yaml"
    path.write_text(json.dumps({"model": settings, "reduce": [stage]}))
    return path


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["run", *arguments, "--max-new-tokens", "4"])


@pytest.mark.parametrize(
    ("name", "side"),
    [("qwen2.5-vl", 2048), ("qwen2-vl", 1024), ("llava-next", 2048), ("internvl", 2048)],
)
def test_from_file_to_answer(tmp_path, model_files, name, side) -> None:
    path = picture(tmp_path, side)
    pipeline = pipeline_file(tmp_path, model_files(name), name, 256)
    document = json.loads(run(str(pipeline), str(path), QUESTION, "--json").stdout)
    receipt = document["receipt"]
    newlines = 6 * 24 if name == "llava-next" else 0
    assert receipt["tokens_in"] == expected_tokens(name, side)
    assert receipt["tokens_out"] == 256 + newlines
    assert "shrunk" not in document
    model, processor, attached = tr.load_pipeline(pipeline).build()
    inputs = chat.encode(processor, chat.open_media(path), QUESTION, model.device)
    with attached:
        assert chat.answer(model, processor, inputs, max_new_tokens=4) == document["answer"]
        [item] = attached.reductions
    # What was kept stands all over the picture.
    coords = item.layout.coords
    kept = coords[item.reduction.positions[0]]
    assert kept[:, 0].unique().equal(coords[:, 0].unique())
    assert (kept[:, 2:].amax(0) > 0.9 * coords[:, 2:].amax(0)).all()


def test_a_picture_that_is_made_smaller_is_told_of(tmp_path, model_files) -> None:
    files, path = model_files("qwen2.5-vl"), picture(tmp_path, 1400)
    pipeline = tmp_path / "pipeline.yaml"
    pipeline.write_text(f"model: {{path: {files}}}\nreduce: [{{strategy: lftr, keep: 64}}]\n")
    asked = [str(pipeline), str(path), QUESTION]
    document = json.loads(run(*asked, "--json").stdout)
    [width, height] = document["shrunk"]["encoded"]
    assert document["shrunk"]["given"] == [1400, 1400]
    assert width * height == document["receipt"]["tokens_in"] * 28**2 <= 28**2 * 1280
    said = run(*asked).stdout
    assert f"made the picture {width} x {height} pixels, of 1400 x 1400" in said
    [advice] = [word for word in said.split() if word.startswith("model.max_pixels=")]
    assert "shrunk" not in json.loads(run(*asked, advice, "--json").stdout)


def test_a_picture_has_no_frames_a_second(tmp_path) -> None:
    pipeline = pipeline_file(tmp_path, tmp_path, "internvl", 4)
    result = run(str(pipeline), str(picture(tmp_path, 40)), QUESTION, "--fps", "2")
    assert result.exit_code == 1
    assert "is a picture, not a clip" in result.stderr


def test_a_limit_that_cannot_be_set_is_refused(model_files) -> None:
    for name in ("llava-next", "internvl"):
        processor = transformers.AutoProcessor.from_pretrained(model_files(name))
        with pytest.raises(PipelineError, match="only processors of native resolution"):
            limit_pixels(processor, 10**8)
    processor = transformers.AutoProcessor.from_pretrained(model_files("qwen2-vl"))
    with pytest.raises(PipelineError, match="at least 3136 pixels"):
        limit_pixels(processor, 100)
    for wrong in (0, True, -4):
        with pytest.raises(PipelineError, match="positive number of pixels"):
            tr.ModelSettings(path="somewhere", max_pixels=wrong)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "side", "neighbors"),
    [
        ("qwen2.5-vl", 8192, "faiss-ivf"),
        ("qwen2.5-vl", 8192, "torch"),
        # At twice the side, attention of each patch to all takes sixteen times as long.
        ("qwen2-vl", 4096, "faiss-ivf"),
        ("llava-next", 8192, "faiss-ivf"),
        ("internvl", 8192, "torch"),
    ],
)
def test_thousands_of_pixels_a_side(tmp_path, model_files, name, side, neighbors) -> None:
    if neighbors.startswith("faiss"):
        pytest.importorskip("faiss", reason="the extra 'faiss' is missing")
    pipeline = pipeline_file(tmp_path, model_files(name), name, 1024, neighbors=neighbors)
    path = picture(tmp_path, side)
    asked = ["run", str(pipeline), str(path), QUESTION, "--max-new-tokens", "4", "--json"]
    done = subprocess.run(
        [sys.executable, "-c", CHILD, *asked], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    receipt = json.loads(done.stdout)["receipt"]
    seconds, chosen, peak = map(float, done.stderr.split()[-3:])
    print(
        f"{name}, {neighbors}: {receipt['tokens_in']} tokens, {seconds:.1f} s, of them {chosen:.1f}"
        f" to choose, {peak / 2**30:.2f} GiB"
    )
    newlines = 6 * 24 if name == "llava-next" else 0
    assert receipt["tokens_in"] == expected_tokens(name, side)
    assert receipt["tokens_out"] == 1024 + newlines
    # The libraries and the picture, and twice the patches as the encoder reads them.
    patches = 4 * receipt["tokens_in"] * (4 * 3 * 2 * 14**2 if name.startswith("qwen") else 0)
    assert peak < 2.5 * 2**30 + 2 * patches
