import json

import numpy as np
import pytest
from PIL import Image

from tokenreduce_integrations.cli import demo


def test_demo_answers_and_draws(tokenreduce, tmp_path) -> None:
    result = tokenreduce("demo", "--strategy", "norm-topk", "--json")
    assert result.exit_code == 0
    document = json.loads(result.stdout)
    settings = document["settings"]
    assert [setting["reduction"] for setting in settings] == [1, 4, 8, 16]
    assert [setting["tokens"] for setting in settings] == [144, 36, 18, 9]
    assert len(document["questions"]) == 10
    for setting in settings:
        truths = [question["answer"] for question in document["questions"]]
        right = sum(a == b for a, b in zip(setting["answers"], truths, strict=True))
        assert setting["correct"] == right
        assert setting["prefill_ms"] > 0
    with Image.open(tmp_path / "tokenreduce-demo.png") as drawn:
        assert drawn.width > 4 * 384


def test_demo_prints_a_table(tokenreduce, tmp_path) -> None:
    result = tokenreduce("demo", "--strategy", "uniform", "--seed", 2, "--output", "x.png")
    assert result.exit_code == 0
    for words in ("question", "truth", "all tokens", "16x fewer", "visual tokens", "prefill ms"):
        assert words in result.stdout
    assert (tmp_path / "x.png").exists()


def test_demo_of_an_unknown_strategy(tokenreduce) -> None:
    result = tokenreduce("demo", "--strategy", "norm-top")
    assert result.exit_code == 1
    assert "Did you mean 'norm-topk'" in result.stderr


@pytest.mark.parametrize("seed", range(3))
def test_the_scene_follows_from_the_seed(seed: int) -> None:
    first, questions = demo.pose(seed)
    again, _ = demo.pose(seed)
    other, _ = demo.pose(seed + 1)
    assert np.array_equal(np.asarray(first), np.asarray(again))
    assert not np.array_equal(np.asarray(first), np.asarray(other))
    assert len({question.text for question in questions}) == demo.QUESTIONS
