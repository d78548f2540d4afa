"""The model for clips: what ships, how it answers, and that reductions reach it."""

import pytest
import torch

import tokenreduce as tr
from tokenreduce_integrations import testbed
from tokenreduce_integrations.testbed import packed
from tokenreduce_integrations.testbed.clips import CLIP_QUESTION_TYPES, ClipGenerator
from tokenreduce_integrations.testbed.evaluation import (
    Bootstrap,
    answer_questions,
    encode_clips,
    reduce_features,
)
from tokenreduce_integrations.testbed.models import card, load, model_path, reported_types

torch.set_num_threads(1)

GENERATOR = ClipGenerator(41)
CLIPS = [GENERATOR.clip(index) for index in range(3)]
TOKENS = 8 * 6 * 6 + 1


@pytest.fixture(scope="module")
def loaded():
    return load("video")


@pytest.fixture(scope="module")
def encoded(loaded):
    return encode_clips(
        *loaded, seed=41, clips=6, types=reported_types("video"), signals=["class_attention"]
    )


def inputs_of(processor, clip, texts):
    """A batch of prompts about one clip."""
    frames = [list(clip.frames)] * len(texts)
    prompts = [testbed.clip_prompt(text) for text in texts]
    return processor(videos=frames, text=prompts, return_tensors="pt", padding=True)


def generated(model, processor, inputs):
    """First words of greedy answers."""
    output = model.generate(**inputs, do_sample=False, max_new_tokens=2)
    new = output[:, inputs["input_ids"].shape[1] :]
    return [processor.decode(row).split()[0] for row in new]


def test_it_stays_small_and_loads_in_the_wanted_precision() -> None:
    assert sum(file.stat().st_size for file in model_path("video").iterdir()) < 5e6
    model, processor = load("video", torch.bfloat16)
    assert not model.training
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert processor.tokenizer.padding_side == "left"


def test_reported_types_are_learned_well_above_the_majority_answer() -> None:
    by_type = card("video")["evaluation"]["by_type"]
    assert set(by_type) == set(CLIP_QUESTION_TYPES)
    assert reported_types("video")
    for kind in reported_types("video"):
        assert by_type[kind]["accuracy"] >= by_type[kind]["majority"] + 0.15


def test_the_chat_template_writes_the_prompt(loaded) -> None:
    _, processor = loaded
    content = [{"type": "video"}, {"type": "text", "text": "what shape moved ?"}]
    written = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )
    assert written == testbed.clip_prompt("what shape moved ?")


def test_packed_answers_equal_generated_answers(loaded) -> None:
    model, processor = loaded
    for clip in CLIPS:
        texts = [question.text for question in GENERATOR.questions(clip)]
        inputs = inputs_of(processor, clip, texts)
        assert int((inputs["input_ids"][0] == model.config.video_token_id).sum()) == TOKENS
        with torch.no_grad():
            pixels = inputs["pixel_values_videos"][:1]
            features = model.get_video_features(pixels).pooler_output
        positions = packed.image_positions(1, TOKENS)
        (answers,) = packed.answer(model, features, positions, [texts], unreduced=TOKENS)
        assert answers == generated(model, processor, inputs)


def test_it_answers_held_out_clips(loaded, encoded) -> None:
    correct = answer_questions(loaded[0], encoded)
    assert correct.mean() > 0.75


@pytest.mark.parametrize("strategy", ["lftr", "evs", "flashvid"])
def test_cached_answers_equal_those_of_an_attachment(loaded, encoded, strategy) -> None:
    model, processor = loaded
    reducer = tr.create_strategy(strategy, reduction=8)
    cached = answer_questions(model, encoded, reducer)
    clip, asked = ClipGenerator(41).clip(0), encoded.questions[0]
    inputs = inputs_of(processor, clip, [question.text for question in asked])
    with tr.attach(model, reducer, processor=processor) as reduced:
        answers = generated(model, processor, inputs)
        receipt = reduced.receipt
    assert [word == question.answer for word, question in zip(answers, asked, strict=True)] == list(
        cached[: len(asked)]
    )
    assert {(item.tokens_in, item.tokens_out) for item in receipt.items} == {(TOKENS, 37)}


def test_the_newline_stands_outside_the_budget(encoded) -> None:
    reduction = reduce_features(
        tr.create_strategy("uniform", reduction=16), encoded.features, encoded.layout
    )
    assert reduction.kept == 18 + 1
    assert (reduction.positions[:, -1] == TOKENS - 1).all()


def test_questions_of_some_types_are_found_among_all(loaded, encoded) -> None:
    correct = answer_questions(loaded[0], encoded)
    some, chosen = encoded.only(["moved", "count"])
    by_type = Bootstrap(encoded, resamples=1).by_type(correct)
    assert len(correct[chosen]) == sum(map(len, some.questions)) > 0
    assert Bootstrap(some, resamples=1).by_type(correct[chosen]) == {
        kind: by_type[kind] for kind in ("moved", "count")
    }


def test_nothing_to_evaluate_is_refused(loaded) -> None:
    with pytest.raises(ValueError, match="nothing to evaluate"):
        encode_clips(*loaded, seed=1, clips=0, types=["moved"])
