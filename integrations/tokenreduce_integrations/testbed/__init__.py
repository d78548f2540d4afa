"""A tiny trained LLaVA model with rendered scenes, to measure what a token reduction costs."""

from tokenreduce_integrations.testbed.examples import example_image, prompt
from tokenreduce_integrations.testbed.models import load, model_path

__all__ = ["example_image", "load", "model_path", "prompt"]
