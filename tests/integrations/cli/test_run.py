import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from PIL import Image

from tokenreduce_integrations.cli import chat

QUESTION = "what is the background ?"
AV = find_spec("av") is not None


def test_run_prints_the_answer_and_the_receipt(tokenreduce, pipeline, picture) -> None:
    result = tokenreduce("run", pipeline, picture, QUESTION)
    assert result.exit_code == 0
    assert "144 -> 18 visual tokens" in result.stdout


def test_run_as_json(tokenreduce, pipeline, picture) -> None:
    result = tokenreduce("run", pipeline, picture, QUESTION, "reduce.0.reduction=16", "--json")
    document = json.loads(result.stdout)
    assert document["reduced"] is True
    assert document["receipt"]["tokens_in"] == 144
    assert document["receipt"]["tokens_out"] == 9
    assert document["answer"]


def test_run_without_reduction(tokenreduce, pipeline, picture) -> None:
    document = json.loads(
        tokenreduce("run", pipeline, picture, QUESTION, "--no-reduction", "--json").stdout
    )
    assert document["reduced"] is False
    assert document["receipt"]["tokens_out"] == 144


def test_the_answer_is_as_long_as_asked(tokenreduce, pipeline, picture) -> None:
    arguments = ("run", pipeline, picture, QUESTION, "--json", "--max-new-tokens")
    assert len(json.loads(tokenreduce(*arguments, 1).stdout)["answer"].split()) == 1
    assert tokenreduce(*arguments, 0).exit_code == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("no picture", "no.png: no such file or folder"),
        ("text as picture", "text.png: is not an image. Give a PNG"),
        (
            "text as clip",
            "clip.mp4: cannot be decoded" if AV else "pip install 'tokenreduce[video]'",
        ),
        ("half a picture", "half.png: the image cannot be read"),
        ("empty folder", "empty: the folder holds no frames"),
        ("empty question", "the question is empty"),
        ("no pipeline", "no.yaml: no such pipeline file or preset"),
        ("bad pipeline", "reduce[0].keeep: unknown key"),
        ("bad override", "override 'reduce.7.keep=1'"),
        ("no model", "names no model"),
        ("a clip for a model of pictures", "takes no clips"),
    ],
)
def test_what_the_user_gets_wrong_is_one_message(
    tokenreduce, pipeline, picture, tmp_path, change, message
) -> None:
    arguments = [pipeline, picture, QUESTION]
    (tmp_path / "text.png").write_text("not a picture")
    (tmp_path / "clip.mp4").write_text("not a picture either")
    (tmp_path / "half.png").write_bytes(picture.read_bytes()[:2000])
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.yaml").write_text("reduce: [{strategy: norm-topk, keeep: 3}]")
    (tmp_path / "bare.yaml").write_text("reduce: [{strategy: norm-topk, keep: 3}]")
    (tmp_path / "frames").mkdir()
    (tmp_path / "frames" / "0.png").write_bytes(picture.read_bytes())
    match change:
        case "no picture":
            arguments[1] = "no.png"
        case "text as picture":
            arguments[1] = "text.png"
        case "text as clip":
            arguments[1] = "clip.mp4"
        case "half a picture":
            arguments[1] = "half.png"
        case "empty folder":
            arguments[1] = "empty"
        case "empty question":
            arguments[2] = "  "
        case "no pipeline":
            arguments[0] = "no.yaml"
        case "bad pipeline":
            arguments[0] = "bad.yaml"
        case "bad override":
            arguments.append("reduce.7.keep=1")
        case "no model":
            arguments[0] = "bare.yaml"
        case _:
            arguments[1] = "frames"
    result = tokenreduce("run", *arguments, "--json")
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_the_script_itself(pipeline, picture, tmp_path) -> None:
    """One JSON document on standard output and nothing else, in a process of its own."""
    command = [sys.executable, "-m", "tokenreduce_integrations.cli", "run"]
    done = subprocess.run(
        [*command, pipeline, picture, QUESTION, "--json"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["receipt"]["tokens_out"] == 18
    failed = subprocess.run(
        [*command, "no.yaml", picture, QUESTION],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=120,
        check=False,
    )
    assert failed.returncode == 1
    assert failed.stdout == ""
    assert len(failed.stderr.splitlines()) == 1


# -- opening media ---------------------------------------------------------------------------


def test_pictures_are_opened_upright_and_in_colour(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by a quarter
    Image.new("L", (30, 20)).save(tmp_path / "x.jpg", exif=exif)
    [opened] = chat.open_media(tmp_path / "x.jpg").frames
    assert opened.size == (20, 30)
    assert opened.mode == "RGB"


def test_a_folder_is_a_clip_in_the_order_of_names(tmp_path: Path) -> None:
    for name, level in (("b.png", 2), ("a.png", 1), ("c.png", 3)):
        Image.new("L", (4, 4), level).save(tmp_path / name)
    (tmp_path / ".hidden").write_text("")
    media = chat.open_media(tmp_path)
    assert media.modality == "video"
    assert [frame.getpixel((0, 0)) for frame in media.frames] == [(n, n, n) for n in (1, 2, 3)]


def test_an_animation_is_a_clip(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "green", "blue")]
    path = tmp_path / "x.gif"
    frames[0].save(path, save_all=True, append_images=frames[1:])
    assert len(chat.open_media(path).frames) == 3


def test_a_clip_for_a_model_of_clips(tmp_path: Path) -> None:
    """The processor of Qwen2.5-VL with a vocabulary of ten words takes a folder of frames."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2_5_VLProcessor
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor
    from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor

    special = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    words = ["<pad>", "<unk>", *special, "user", "what", "is", "this"]
    vocabulary = models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    tokenizer = Tokenizer(vocabulary)
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    processor = Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(),
        tokenizer=PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            unk_token="<unk>",
            pad_token="<pad>",
            additional_special_tokens=special,
        ),
        video_processor=Qwen2VLVideoProcessor(cap_pixels_per_frame=False),
        chat_template=(
            "{% for m in messages %}{{ m['role'] }} {% for c in m['content'] %}"
            "{% if c['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
            "{% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endfor %}"
        ),
    )
    for i in range(4):
        Image.new("RGB", (56, 56), (i, 0, 0)).save(tmp_path / f"{i}.png")
    media = chat.open_media(tmp_path)
    inputs = chat.encode(processor, media, "what is this", torch.device("cpu"))
    frames, height, width = inputs["video_grid_thw"][0].tolist()
    assert frames == 2
    placeholders = (inputs["input_ids"] == words.index("<|video_pad|>")).sum()
    assert int(placeholders) == frames * height * width // 4
