"""Tiny trained models with rendered scenes and clips, to measure what a token reduction costs."""

from tokenreduce_integrations.testbed.examples import (
    clip_prompt,
    example_clip,
    example_image,
    prompt,
)
from tokenreduce_integrations.testbed.models import load, model_path

__all__ = ["clip_prompt", "example_clip", "example_image", "load", "model_path", "prompt"]
