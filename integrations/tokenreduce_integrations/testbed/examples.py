"""A picture and a prompt to try things on."""

from PIL import Image

from tokenreduce_integrations.testbed.scenes import SceneGenerator


def example_image(seed: int = 0) -> Image.Image:
    """A rendered scene that no testbed model was trained on, 96 x 96 pixels."""
    return Image.fromarray(SceneGenerator(seed).sample().image)


def prompt(question: str) -> str:
    """A question about one picture, as the testbed models' chat template writes it."""
    return f"<image> USER: {question} ASSISTANT:"
