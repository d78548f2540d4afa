"""A picture, a clip and prompts to try things on."""

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tokenreduce_integrations.testbed.clips import ClipGenerator
from tokenreduce_integrations.testbed.scenes import SceneGenerator


def example_image(seed: int = 0) -> Image.Image:
    """A rendered scene that no testbed model was trained on, 96 x 96 pixels."""
    return Image.fromarray(SceneGenerator(seed).sample().image)


def prompt(question: str) -> str:
    """A question about one picture, as the testbed models' chat template writes it."""
    return f"<image> USER: {question} ASSISTANT:"


def example_clip(seed: int = 0) -> NDArray[np.uint8]:
    """Frames of a rendered clip that no testbed model was trained on, ``(8, 96, 96, 3)``."""
    return ClipGenerator(seed).clip(0).frames


def clip_prompt(question: str) -> str:
    """A question about one clip, as the chat template of the model for clips writes it."""
    return f"<video> USER: {question} ASSISTANT:"
