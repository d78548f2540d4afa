"""``tokenreduce demo``."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from tokenreduce_integrations.cli.output import Json, console, print_json, save_picture, table

if TYPE_CHECKING:
    from PIL import Image
    from torch import nn

    from tokenreduce.attachment import Attachment
    from tokenreduce_integrations.testbed.scenes import Question

MODEL = "b"
REDUCTIONS = (1, 4, 8, 16)
QUESTIONS = 10
PREFILL_ROUNDS = 5


@dataclass(frozen=True)
class Setting:
    """What one budget gave.

    Attributes:
        reduction: how many times fewer tokens; 1 is the model as it is.
        tokens: visual tokens that the LLM saw.
        prefill_ms: median time of the prefill of a batch of as many prompts as there are questions.
        answers: one for each question.
        correct: how many of them are right.
    """

    reduction: int
    tokens: int
    prefill_ms: float
    answers: tuple[str, ...]
    correct: int

    @property
    def label(self) -> str:
        """How the table and the picture call it."""
        return "all tokens" if self.reduction == 1 else f"{self.reduction}x fewer"


def demo(
    seed: Annotated[int, typer.Option(min=0, help="Which scene to draw.")] = 0,
    strategy: Annotated[str, typer.Option(help="The strategy to show.")] = "lftr",
    output: Annotated[Path, typer.Option(help="The PNG to write.")] = Path("tokenreduce-demo.png"),
    as_json: Json = False,
) -> None:
    """Answer questions about a drawn scene with all tokens and with 4, 8 and 16 times fewer.

    Runs in seconds on a CPU and needs no download: a tiny multimodal LLM ships with the package.
    """
    import tokenreduce
    from tokenreduce.testing.cost import one_thread
    from tokenreduce_integrations.cli import chat
    from tokenreduce_integrations.testbed.models import load

    reducer = tokenreduce.create_strategy(strategy, reduction=REDUCTIONS[-1])
    chat.quiet_loading()
    image, questions = pose(seed)
    model, processor = load(MODEL)
    prompts = [
        chat.encode(processor, chat.Media("image", (image,)), question.text, model.device)
        for question in questions
    ]
    # Threads that wait for each other cost more than they save on a model this small.
    with one_thread(), tokenreduce.attach(model, reducer, processor=processor) as attachment:
        settings, pictures = [], []
        times = _prefill_times(model, attachment, prompts[0])
        for reduction in REDUCTIONS:
            with _budget(attachment, reduction):
                answers = tuple(
                    chat.answer(model, processor, prompt, max_new_tokens=1) for prompt in prompts
                )
                tokens = attachment.receipt.tokens_out
                pictures.append(_overlay(image, attachment))
            right = sum(a == q.answer for a, q in zip(answers, questions, strict=True))
            settings.append(Setting(reduction, tokens, times[reduction], answers, right))
    _save(pictures, settings, output)
    if as_json:
        print_json(
            {
                "seed": seed,
                "strategy": strategy,
                "questions": [asdict(question) for question in questions],
                "settings": [asdict(setting) for setting in settings],
                "output": str(output),
            }
        )
        return
    _print(questions, settings, seed, strategy, output)


def pose(seed: int) -> tuple[Image.Image, list[Question]]:
    """A scene, and questions about it of the types that the model has learned.

    Not every scene has as many questions in it; the first one from the seed on that has is taken.
    """
    from PIL import Image

    from tokenreduce_integrations.testbed.models import reported_types
    from tokenreduce_integrations.testbed.scenes import SceneGenerator

    generator, types = SceneGenerator(seed=seed), reported_types(MODEL)
    while True:
        scene = generator.sample()
        questions = generator.questions(scene, count=QUESTIONS, types=types)
        if len(questions) == QUESTIONS:
            return Image.fromarray(scene.image), questions


def _budget(attachment: Attachment, reduction: int) -> AbstractContextManager[None]:
    return attachment.disabled() if reduction == 1 else attachment.budget(reduction=reduction)


def _prefill_times(
    model: nn.Module, attachment: Attachment, prompt: dict[str, Any]
) -> dict[int, float]:
    """Median milliseconds of a prefill for each reduction, measured in turn.

    A single prompt is so short for a model this small that the time around it is all one sees.
    """
    import torch

    batch = {
        name: tensor.repeat(QUESTIONS, *(1 for _ in tensor.shape[1:]))
        for name, tensor in prompt.items()
    }
    taken: dict[int, list[float]] = {reduction: [] for reduction in REDUCTIONS}
    with torch.no_grad():
        for turn in range(PREFILL_ROUNDS + 1):
            for reduction in REDUCTIONS:
                with _budget(attachment, reduction):
                    started = time.perf_counter()
                    model(**batch, logits_to_keep=1)
                    elapsed = 1000 * (time.perf_counter() - started)
                # The first round warms up.
                if turn:
                    taken[reduction].append(elapsed)
    return {reduction: median(times) for reduction, times in taken.items()}


def _overlay(image: Image.Image, attachment: Attachment) -> Image.Image:
    from tokenreduce_integrations.overlay import draw_overlay

    return draw_overlay(image, attachment.reductions[0])


def _save(pictures: list[Image.Image], settings: list[Setting], output: Path) -> None:
    from tokenreduce_integrations.overlay import side_by_side

    labels = [f"{setting.label} ({setting.tokens})" for setting in settings]
    save_picture(side_by_side(pictures, labels), output)


def _print(
    questions: list[Question], settings: list[Setting], seed: int, strategy: str, output: Path
) -> None:
    def marked(answer: str, truth: str) -> Text:
        return Text(answer, style="green" if answer == truth else "bold red")

    def rows() -> Iterator[tuple[object, ...]]:
        for i, question in enumerate(questions):
            answers = (marked(setting.answers[i], question.answer) for setting in settings)
            yield (question.text, question.answer, *answers)
        yield ("visual tokens", "", *(setting.tokens for setting in settings))
        yield (
            f"prefill ms, batch of {QUESTIONS}",
            "",
            *(f"{setting.prefill_ms:.1f}" for setting in settings),
        )
        correct = (f"{setting.correct} of {len(questions)}" for setting in settings)
        yield ("correct", "", *correct)

    made = table(
        ("question", "truth", *(setting.label for setting in settings)),
        rows(),
        title=f"scene {seed}, strategy {strategy}",
    )
    made.rows[len(questions) - 1].end_section = True
    out = console()
    out.print(made)
    out.print(f"What was kept is drawn in {output}.", markup=False, soft_wrap=True)
