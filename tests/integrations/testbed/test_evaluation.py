"""A small end-to-end run on encoded scenes."""

import numpy as np
import pytest
import torch
from PIL import Image

import tokenreduce as tr
from tokenreduce.errors import BudgetError, MissingSignal
from tokenreduce.reducer import Scorer
from tokenreduce_integrations.testbed.evaluation import (
    Bootstrap,
    answer_questions,
    encode_scenes,
    reduce_features,
)
from tokenreduce_integrations.testbed.models import load
from tokenreduce_integrations.testbed.scenes import QUESTION_TYPES, SceneGenerator

# These tensors are small, and waiting for other threads costs more than it saves.
torch.set_num_threads(1)


@pytest.fixture(scope="module")
def model_and_processor():
    return load("a")


@pytest.fixture(scope="module")
def encoded(model_and_processor):
    return encode_scenes(*model_and_processor, seed=77, scenes=12, types=QUESTION_TYPES)


def test_questions_are_distinct_and_reproducible(encoded, model_and_processor):
    texts = [[question.text for question in row] for row in encoded.questions]
    assert all(len(set(row)) == len(row) for row in texts)
    assert len(encoded.scene_of) == sum(map(len, texts))
    again = encode_scenes(*model_and_processor, seed=77, scenes=12, types=QUESTION_TYPES)
    assert again.questions == encoded.questions
    assert torch.equal(again.features, encoded.features)
    some = encode_scenes(*model_and_processor, seed=77, scenes=12, types=["color", "count"])
    assert {question.type for row in some.questions for question in row} <= {"color", "count"}


def test_nothing_to_evaluate_is_refused(model_and_processor):
    for scenes, types in ((0, QUESTION_TYPES), (1, ())):
        with pytest.raises(ValueError, match="nothing to evaluate"):
            encode_scenes(*model_and_processor, seed=1, scenes=scenes, types=types)


def test_a_budget_of_everything_changes_no_answer(encoded, model_and_processor):
    unreduced = answer_questions(model_and_processor[0], encoded)
    keep_all = answer_questions(
        model_and_processor[0], encoded, tr.create_strategy("lftr", keep=144)
    )
    assert np.array_equal(unreduced, keep_all)
    assert Bootstrap(encoded).difference(unreduced, keep_all).high == 0


class NeedsText(Scorer):
    """Reads a signal that cached features do not have."""

    needs = ("text_embeddings",)

    def score(self, tokens):
        raise AssertionError


def test_reducers_that_cannot_run_say_why(encoded, model_and_processor):
    with pytest.raises(BudgetError):
        answer_questions(model_and_processor[0], encoded, tr.create_strategy("lftr"))
    with pytest.raises(MissingSignal):
        answer_questions(model_and_processor[0], encoded, NeedsText(keep=3))


@pytest.mark.parametrize("strategy", ["lftr", "norm-topk"])
def test_answers_are_those_of_the_attached_model(strategy, encoded, model_and_processor):
    model, processor = model_and_processor
    reducer = tr.create_strategy(strategy, reduction=8)
    expected = answer_questions(model, encoded, reducer)
    generator, got = SceneGenerator(77, "test"), []
    with tr.attach(model, reducer, processor=processor) as run:
        for index, row in enumerate(encoded.questions[:3]):
            picture = Image.fromarray(generator.scene(index).image)
            for question in row:
                content = [{"type": "image"}, {"type": "text", "text": question.text}]
                prompt = processor.apply_chat_template(
                    [{"role": "user", "content": content}], add_generation_prompt=True
                )
                inputs = processor(images=picture, text=prompt, return_tensors="pt")
                output = model.generate(**inputs, do_sample=False, max_new_tokens=1)
                word = processor.decode(output[0, inputs["input_ids"].shape[1] :]).strip()
                got.append(word == question.answer)
            kept = run.reductions[-1].reduction.positions[0]
            cached = reduce_features(reducer, encoded.features[index : index + 1])
            assert torch.equal(kept, cached.positions[0])
    assert got == expected[: len(got)].tolist()
