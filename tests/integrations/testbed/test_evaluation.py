"""The evaluation's statistics against slow oracles, and a small end-to-end run."""

import numpy as np
import pytest
import torch
from PIL import Image

import tokenreduce as tr
from tokenreduce.errors import BudgetError, MissingSignal
from tokenreduce.reducer import Scorer
from tokenreduce_integrations.testbed.evaluation import (
    Bootstrap,
    EncodedScenes,
    answer_questions,
    encode_scenes,
    reduce_features,
)
from tokenreduce_integrations.testbed.models import load
from tokenreduce_integrations.testbed.scenes import QUESTION_TYPES, Question, SceneGenerator

# These tensors are small, and waiting for other threads costs more than it saves.
torch.set_num_threads(1)


def asked(*rows):
    """Scenes with questions of the given types and no content."""
    questions = tuple(
        tuple(Question(kind, f"question {i} ?", "yes") for i, kind in enumerate(row))
        for row in rows
    )
    types = tuple(sorted({kind for row in rows for kind in row}))
    return EncodedScenes(
        features=torch.zeros(len(rows), 144, 1), questions=questions, types=types, seed=0
    )


ROWS = (["color", "shape"], ["color"], ["shape", "shape", "count"], ["count", "color"], ["color"])
CORRECT = np.array([1, 0, 1, 1, 0, 1, 0, 1, 1], bool)
OTHER = np.array([0, 0, 1, 0, 0, 1, 1, 1, 0], bool)


def slow_macro(rows, correct, chosen):
    """Macro accuracy over the chosen scenes, counted question by question."""
    starts = np.cumsum([0, *map(len, rows)])
    right = {}
    for scene in chosen:
        for offset, kind in enumerate(rows[scene]):
            right.setdefault(kind, []).append(correct[starts[scene] + offset])
    return np.mean([np.mean(values) for values in right.values()])


def test_macro_weighs_question_types_alike():
    bootstrap = Bootstrap(asked(*ROWS), resamples=10)
    assert bootstrap.by_type(CORRECT) == {"color": 1.0, "shape": 1 / 3, "count": 1 / 2}
    value = bootstrap.macro(CORRECT).value
    assert value == pytest.approx((1 + 1 / 3 + 1 / 2) / 3)
    assert value == pytest.approx(slow_macro(ROWS, CORRECT, range(5)))


def test_intervals_equal_those_of_a_slow_bootstrap():
    resamples, seed = 300, 4
    bootstrap = Bootstrap(asked(*ROWS), resamples=resamples, seed=seed)
    rng = np.random.default_rng(seed)
    macros, differences = [], []
    for counts in rng.multinomial(5, [0.2] * 5, size=resamples):
        chosen = np.repeat(np.arange(5), counts)
        mine, other = (slow_macro(ROWS, answers, chosen) for answers in (CORRECT, OTHER))
        macros.append(mine)
        differences.append(mine - other)
    for estimate, values in (
        (bootstrap.macro(CORRECT), macros),
        (bootstrap.difference(CORRECT, OTHER), differences),
    ):
        assert (estimate.low, estimate.high) == pytest.approx(
            tuple(np.quantile(values, [0.025, 0.975]))
        )
    assert bootstrap.share(CORRECT, CORRECT).low == 1
    assert bootstrap.difference(CORRECT, CORRECT).high == 0


def test_intervals_cover_as_often_as_they_claim():
    """Scenes with a common difficulty: resampling questions would give too narrow intervals."""
    rng = np.random.default_rng(0)
    rows = [["color"] * 4] * 150
    scenes = asked(*rows)
    covered = 0
    for _ in range(200):
        difficulty = rng.choice([0.1, 0.9], size=150)
        correct = (rng.random((150, 4)) < difficulty[:, None]).ravel()
        estimate = Bootstrap(scenes, resamples=200).macro(correct)
        covered += estimate.low <= 0.5 <= estimate.high
    assert 0.9 <= covered / 200 <= 0.99


def test_resamples_are_seeded():
    scenes, correct = asked(*ROWS * 20), np.tile(CORRECT, 20)
    first, same, other = (Bootstrap(scenes, resamples=50, seed=seed) for seed in (1, 1, 2))
    assert first.macro(correct) == same.macro(correct)
    assert first.macro(correct) != other.macro(correct)


@pytest.fixture(scope="module")
def model_and_processor():
    return load("a")


@pytest.fixture(scope="module")
def encoded(model_and_processor):
    return encode_scenes(*model_and_processor, seed=77, scenes=12, types=QUESTION_TYPES)


def test_questions_are_distinct_and_reproducible(encoded, model_and_processor):
    texts = [[question.text for question in row] for row in encoded.questions]
    assert all(len(set(row)) == len(row) for row in texts)
    assert len(encoded.scene_of) == len(encoded.type_of) == sum(map(len, texts))
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
