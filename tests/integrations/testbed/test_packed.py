"""The packed evaluator gives the answers that `generate` gives."""

import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from tokenreduce_integrations.testbed import packed
from tokenreduce_integrations.testbed.models import MODEL_NAMES, load
from tokenreduce_integrations.testbed.scenes import Scene, SceneGenerator

Loaded = tuple[LlavaForConditionalGeneration, LlavaProcessor]
GENERATOR = SceneGenerator(41)
SCENES = [GENERATOR.sample() for _ in range(5)]
TEXTS = [[question.text for question in GENERATOR.questions(scene)] for scene in SCENES]


@pytest.fixture(scope="module", params=MODEL_NAMES)
def loaded(request: pytest.FixtureRequest) -> Loaded:
    return load(request.param)


def test_packed_answers_equal_generated_answers(loaded: Loaded) -> None:
    model, processor = loaded
    features = encode(loaded)
    positions = packed.image_positions(len(SCENES))
    answers = packed.answer(model, features, positions, TEXTS)
    assert sum(map(len, TEXTS)) >= 32
    for scene, texts, given in zip(SCENES, TEXTS, answers, strict=True):
        assert generate(model, processor, scene, texts) == given


def test_other_questions_do_not_change_a_reduced_answer(loaded: Loaded) -> None:
    model, _ = loaded
    features = encode(loaded)
    kept = torch.rand(features.shape[:2], generator=torch.Generator().manual_seed(0)).argsort()
    kept = kept[:, :20].sort().values
    reduced = features.gather(1, kept[..., None].expand(-1, -1, features.shape[-1]))
    together = hidden_states(model, reduced, kept + 1, TEXTS)
    for column in range(min(map(len, TEXTS))):
        alone = hidden_states(model, reduced, kept + 1, [[row[column]] for row in TEXTS])
        for row, states in enumerate(alone):
            torch.testing.assert_close(together[row][column], states[0], rtol=1e-3, atol=1e-3)


def test_mismatched_batches_are_refused(loaded: Loaded) -> None:
    features = torch.zeros(2, 4, 128)
    with pytest.raises(ValueError, match="do not belong together"):
        packed.answer(loaded[0], features, packed.image_positions(2), [["?"], ["?"]])


def hidden_states(
    model: LlavaForConditionalGeneration,
    features: Tensor,
    positions: Tensor,
    texts: list[list[str]],
) -> list[list[Tensor]]:
    """Last hidden states of the tokens of every question, without padding."""
    questions = packed.PackedQuestions.from_texts(texts)
    with torch.no_grad():
        states = packed.packed_hidden_states(model, features, positions, questions.input_ids)
    return [
        [states[i, j, : questions.lengths[i, j]] for j in range(len(row))]
        for i, row in enumerate(texts)
    ]


def encode(loaded: Loaded) -> Tensor:
    """Projected visual tokens of all scenes, ``(5, 144, D)``."""
    model, processor = loaded
    images = [Image.fromarray(scene.image) for scene in SCENES]
    pixels = processor.image_processor(images, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        return torch.stack(list(model.get_image_features(pixels).pooler_output))


def generate(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, scene: Scene, texts: list[str]
) -> list[str]:
    """First words of the greedy answers to prompts with one question each."""
    contents = [[{"type": "image"}, {"type": "text", "text": text}] for text in texts]
    prompts = [
        processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )
        for content in contents
    ]
    images = [Image.fromarray(scene.image)] * len(texts)
    inputs = processor(images=images, text=prompts, return_tensors="pt", padding=True)
    output = model.generate(**inputs, do_sample=False, max_new_tokens=2)
    new_tokens = output[:, inputs["input_ids"].shape[1] :]
    return [processor.decode(row).split()[0] for row in new_tokens]
