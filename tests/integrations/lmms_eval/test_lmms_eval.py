"""Tasks of lmms-eval, defined here, through its own command line: ``nox -s lmms_eval``."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import tokenreduce as tr
from tokenreduce_integrations.lmms_eval.answering import PipelineModel
from tokenreduce_integrations.testbed.models import load, reported_types
from tokenreduce_integrations.testbed.scenes import SceneGenerator

pytestmark = pytest.mark.slow
pytest.importorskip("lmms_eval", reason="needs the extra lmms-eval; nox -s lmms_eval installs it")

SCENES = 12
PIPELINE = """
model: {path: "testbed:b", dtype: float32, device: cpu}
reduce:
  - {strategy: lftr, site: projector, reduction: 16}
"""
DATASET = """
dataset_path: parquet
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
metadata: [{{version: 0.0}}]
"""
OPEN = """
task: tiny_open
output_type: generate_until
doc_to_visual: !function utils.to_visual
doc_to_text: question
doc_to_target: answer
generation_kwargs: {max_new_tokens: 1, temperature: 0, until: ["\\n"]}
process_results: !function utils.process_results
metric_list:
  - {metric: accuracy, aggregation: mean, higher_is_better: true}
"""
CHOICE = """
task: tiny_choice
output_type: multiple_choice
doc_to_visual: !function utils.to_visual
doc_to_text: question
doc_to_choice: ["yes", "no"]
doc_to_target: !function utils.to_index
process_docs: !function utils.yes_or_no
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
"""
ROUNDS = """
task: tiny_rounds
output_type: generate_until_multi_round
doc_to_visual: !function utils.to_visual
doc_to_text: !function utils.rounds
doc_to_target: answer
generation_kwargs: {max_new_tokens: 1}
process_results: !function utils.process_rounds
metric_list:
  - {metric: accuracy, aggregation: mean, higher_is_better: true}
"""
WORDS_ONLY = OPEN.replace("tiny_open", "tiny_words").replace(
    "doc_to_visual: !function utils.to_visual\n", ""
)
UTILS = '''
def to_visual(doc):
    return [doc["image"].convert("RGB")]


def to_index(doc):
    return ["yes", "no"].index(doc["answer"])


def yes_or_no(dataset):
    return dataset.filter(lambda doc: doc["answer"] in ("yes", "no"))


def process_results(doc, results):
    return {"accuracy": float(results[0] == doc["answer"])}


def rounds(doc, lmms_eval_specific_kwargs=None, previous_output=None, round_idx=None,
           previous_round_info=None):
    """The question again, and then no more."""
    if round_idx is None:
        return doc["question"]
    return to_visual(doc), doc["question"], round_idx == 2, previous_output, previous_round_info


def process_rounds(doc, results):
    [said] = results
    assert len(said) == 2, said
    return {"accuracy": float(said[1] == doc["answer"])}
'''


def questions() -> list[tuple[Any, Any]]:
    generator, found = SceneGenerator(5, "test"), []
    for index in range(SCENES):
        scene = generator.scene(index)
        asked = generator.questions(scene, count=4, types=reported_types("b"))
        found += [(scene.image, question) for question in asked]
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import datasets
    from PIL import Image

    folder = tmp_path_factory.mktemp("lmms")
    asked = questions()
    rows = {
        "image": [Image.fromarray(image) for image, _ in asked],
        "question": [question.text for _, question in asked],
        "answer": [question.answer for _, question in asked],
    }
    data = folder / "test.parquet"
    datasets.Dataset.from_dict(rows).to_parquet(str(data))
    tasks = folder / "tasks"
    tasks.mkdir()
    (tasks / "utils.py").write_text(UTILS)
    for name, text in (
        ("open", OPEN), ("choice", CHOICE), ("rounds", ROUNDS), ("words", WORDS_ONLY)
    ):  # fmt: skip
        (tasks / f"tiny_{name}.yaml").write_text(text + DATASET.format(data=data))
    (folder / "pipeline.yaml").write_text(PIPELINE)
    return folder


def run(folder: Path, tasks: str, out: Path, *more: str, model_args: str = "") -> Any:
    command = [
        sys.executable, "-m", "lmms_eval", "--model", "tokenreduce", "--tasks", tasks,
        "--model_args", f"pipeline={folder / 'pipeline.yaml'}{model_args}",
        "--include_path", str(folder / "tasks"), "--batch_size", "5", "--log_samples",
        "--output_path", str(out), "--verbosity", "DEBUG", *more,
    ]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, timeout=900, cwd=folder)


def samples(out: Path, task: str) -> list[dict[str, Any]]:
    [file] = out.rglob(f"*_samples_{task}.jsonl")
    return [json.loads(line) for line in file.read_text().splitlines()]


def score(out: Path, task: str, metric: str) -> float:
    [file] = out.rglob("*_results.json")
    found: float = json.loads(file.read_text())["results"][task][f"{metric},none"]
    return found


def direct() -> list[str]:
    """The same questions one by one, without lmms-eval."""
    model, processor = load("b")
    said = []
    from PIL import Image

    with tr.attach(model, tr.create_strategy("lftr", reduction=16), processor=processor) as run:
        pipeline = PipelineModel(model, processor, run)
        for image, question in questions():
            content = [
                {"type": "image", "url": Image.fromarray(image)},
                {"type": "text", "text": question.text},
            ]
            [one] = pipeline.generate([[{"role": "user", "content": content}]],
                                      {"max_new_tokens": 1})  # fmt: skip
            said.append(one.text)
    return said


@pytest.mark.parametrize("more", [(), ("--force_simple",)])
def test_a_local_task_gives_what_the_pipeline_gives(folder: Path, tmp_path: Path, more) -> None:
    done = run(folder, "tiny_open", tmp_path, *more)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    logged = sorted(samples(tmp_path, "tiny_open"), key=lambda sample: sample["doc_id"])
    said = direct()
    assert [sample["filtered_resps"] for sample in logged] == said
    right = [a == q.answer for a, (_, q) in zip(said, questions(), strict=True)]
    assert score(tmp_path, "tiny_open", "accuracy") == pytest.approx(sum(right) / len(right))
    for sample in logged:
        [counts] = sample["token_counts"]
        assert counts["output_tokens"] == 1
        assert (counts["receipt"]["tokens_in"], counts["receipt"]["tokens_out"]) == (144, 9)
        assert [item["prompt"] for item in counts["receipt"]["items"]] == [0]


def test_values_of_the_pipeline_can_be_replaced(folder: Path, tmp_path: Path) -> None:
    done = run(
        folder, "tiny_open", tmp_path, "--limit", "6",
        model_args=",reduce.0.strategy=uniform,reduce.0.reduction=4",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    logged = samples(tmp_path, "tiny_open")
    assert {sample["token_counts"][0]["receipt"]["tokens_out"] for sample in logged} == {36}


def test_multiple_choice_and_rounds(folder: Path, tmp_path: Path) -> None:
    done = run(folder, "tiny_choice,tiny_rounds", tmp_path, "--force_simple", "--limit", "10")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert score(tmp_path, "tiny_choice", "acc") > 0.6
    for sample in samples(tmp_path, "tiny_choice"):
        receipts = [counts["receipt"] for counts in sample["token_counts"]]
        assert [receipt["tokens_out"] for receipt in receipts] == [9, 9]
    for sample in samples(tmp_path, "tiny_rounds"):
        [counts] = sample["token_counts"]
        assert [receipt["tokens_out"] for receipt in counts["receipt"]] == [9, 9]


@pytest.mark.parametrize(
    ("task", "model_args", "message"),
    [
        ("tiny_open", ",reduce.0.reduction=1", "reduced none of"),
        ("tiny_words", "", "shows no picture or clip"),
        ("tiny_open", ",reductoin=4", "unknown reductoin"),
    ],
)
def test_a_strategy_that_did_nothing_fails(
    folder: Path, tmp_path: Path, task: str, model_args: str, message: str
) -> None:
    done = run(folder, task, tmp_path, "--limit", "4", model_args=model_args)
    assert done.returncode != 0
    assert message in done.stderr
    assert not list(tmp_path.rglob("*_results.json"))


def test_the_model_as_it_is(folder: Path, tmp_path: Path) -> None:
    done = run(folder, "tiny_open", tmp_path, "--limit", "4", model_args=",reduced=False")
    assert done.returncode == 0, done.stderr[-4000:]
    for sample in samples(tmp_path, "tiny_open"):
        receipt = sample["token_counts"][0]["receipt"]
        assert receipt["tokens_out"] == 144
        assert "disabled" in receipt["reason"]
