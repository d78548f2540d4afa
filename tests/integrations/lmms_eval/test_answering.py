from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import tokenreduce as tr
from support import qwen_files
from tokenreduce.attachment import Attachment
from tokenreduce.errors import MediaError, PipelineError, StageNotEngaged
from tokenreduce_integrations.lmms_eval.answering import (
    PipelineModel,
    clip_frames,
    cut,
    generation_options,
    media_kinds,
    require_engaged,
)
from tokenreduce_integrations.testbed.models import load
from tokenreduce_integrations.testbed.scenes import SceneGenerator


def conversations(count: int) -> list[Any]:
    """Questions of different lengths about different scenes."""
    generator, found = SceneGenerator(11, "test"), []
    for index in range(count):
        scene = generator.scene(index)
        question = generator.questions(scene)[index % 3]
        content = [
            {"type": "image", "url": Image.fromarray(scene.image)},
            {"type": "text", "text": question.text},
        ]
        found.append([{"role": "user", "content": content}])
    return found


@pytest.fixture(scope="module")
def parts() -> Any:
    return load("b")


def attached(parts: Any, strategy: str, reduction: float = 8) -> Attachment:
    reducer = tr.create_strategy(strategy, reduction=reduction)
    if reducer.record.sites == ("decoder",):
        stage = tr.Stage(reducer=reducer, site="decoder", layer=2)
        return tr.attach(parts[0], stage, processor=parts[1])
    return tr.attach(parts[0], reducer, processor=parts[1])


@pytest.mark.parametrize("strategy", ["lftr", "fastv"])
def test_a_batch_says_what_each_conversation_says_alone(parts: Any, strategy: str) -> None:
    asked = conversations(6)
    with attached(parts, strategy) as run:
        model = PipelineModel(*parts, run)
        together = model.generate(asked, {"max_new_tokens": 2})
        alone = [model.generate([one], {"max_new_tokens": 2})[0] for one in asked]
    assert [one.text for one in together] == [one.text for one in alone]
    assert [one.receipt for one in together] == [one.receipt for one in alone]
    assert {one.receipt["tokens_out"] for one in together} == {18}
    assert all(one.receipt["items"][0]["prompt"] == 0 for one in together)


@pytest.mark.parametrize("strategy", ["lftr", "fastv"])
def test_likelihoods_are_those_of_the_reduced_prompt(parts: Any, strategy: str) -> None:
    """Against the model called by hand: the prompt, then the answer token by token."""
    asked, answers = conversations(3), ["yes", "red star", "3"]
    with attached(parts, strategy) as run:
        model = PipelineModel(*parts, run)
        found = model.likelihoods(asked, answers)
        said = model.generate(asked, {"max_new_tokens": 1})
        for conversation, answer, one in zip(asked, answers, found, strict=True):
            inputs = model._encode([conversation])
            with torch.no_grad():
                output = parts[0](**inputs)
                losses, length = [], inputs["input_ids"].shape[1]
                for token in model.tokenizer(answer, add_special_tokens=False)["input_ids"]:
                    losses.append(-output.logits[0, -1].log_softmax(-1)[token])
                    length += 1
                    output = parts[0](
                        input_ids=torch.tensor([[token]]),
                        attention_mask=torch.ones(1, length, dtype=torch.long),
                        past_key_values=output.past_key_values,
                    )
            assert one.loss == pytest.approx(float(torch.stack(losses).mean()), abs=1e-4)
            assert one.receipt["tokens_out"] == 18
        likely = model.likelihoods(asked, [one.text for one in said])
        assert all(one.greedy for one in likely)
        assert not all(one.greedy for one in found)
        with pytest.raises(MediaError, match="empty continuation"):
            model.likelihoods(asked[:1], [" "])


def test_options_of_tasks() -> None:
    options, until = generation_options(
        {"until": ["\n\n"], "temperature": 0, "top_p": None, "image_aspect_ratio": "pad",
         "max_gen_toks": 7}
    )  # fmt: skip
    assert options == {"max_new_tokens": 7, "do_sample": False, "num_beams": 1}
    assert until == ["\n\n"]
    options, until = generation_options({"do_sample": True, "temperature": 0.7, "until": "."})
    assert (options["do_sample"], options["temperature"], until) == (True, 0.7, ["."])
    assert generation_options({"do_sample": True, "temperature": 0})[0]["do_sample"] is False
    assert cut(" one. two. ", ["."]) == "one"
    assert cut(" one ", ["", "x"]) == "one"


def test_media_of_other_kinds_are_refused(parts: Any) -> None:
    with attached(parts, "lftr") as run:
        model = PipelineModel(*parts, run)
        sound = [{"role": "user", "content": [{"type": "audio", "url": {"array": []}}]}]
        assert media_kinds(sound) == ("audio",)
        with pytest.raises(MediaError, match="audio given as dict"):
            model.generate([sound], {})


def test_a_processor_without_a_template_is_refused(parts: Any) -> None:
    with attached(parts, "lftr") as run, pytest.raises(PipelineError, match="no chat template"):
        PipelineModel(parts[0], object(), run)


def test_frames_of_a_clip_are_evenly_spaced(tmp_path: Path) -> None:
    pytest.importorskip("av", reason="the extra 'video' is missing")
    clip = qwen_files.write_clip(tmp_path / "x.mp4", qwen_files.shapes(40, 32, 48), rate=10)
    assert len(clip_frames(clip, 8)) == 8
    assert len(clip_frames(clip, 8, 1.0, 2.0)) == 8
    for level in range(6):
        Image.new("L", (8, 8), level).save(tmp_path / f"{level}.png")
    clip.unlink()
    shown = clip_frames(tmp_path, 3)
    assert [frame.getpixel((0, 0))[0] for frame in shown] == [0, 2, 4]


def test_stages_that_did_nothing_are_an_error(parts: Any) -> None:
    with attached(parts, "lftr") as run:
        model = PipelineModel(*parts, run)
        [good] = model.generate(conversations(1), {"max_new_tokens": 1})
        with run.budget(keep=144):
            [idle] = model.generate(conversations(1), {"max_new_tokens": 1})
    require_engaged("task", [idle.receipt, good.receipt])
    with pytest.raises(StageNotEngaged, match=r"'task'.*'lftr'.*within the budget"):
        require_engaged("task", [idle.receipt])
    with pytest.raises(StageNotEngaged, match="shows no picture or clip"):
        require_engaged("task", [])
