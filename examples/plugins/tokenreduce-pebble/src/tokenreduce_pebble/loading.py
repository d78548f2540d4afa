"""Loading a model together with the code that ships with it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from tokenreduce.errors import PipelineError
from tokenreduce.pipeline import ModelSettings
from tokenreduce.stage import Stage
from tokenreduce_pebble.adapter import PebbleAdapter


def load_model(settings: ModelSettings, stages: Sequence[Stage] = ()) -> tuple[Any, Any]:
    """Load Pebble and its processor. Runs the code in the model's folder.

    Args:
        settings: what to load, and how.
        stages: the stages that will run on it, checked before weights are read.

    Raises:
        PipelineError: if the path is no folder on this machine, or the settings ask for what Pebble
            has not.
    """
    if not Path(settings.path).is_dir():
        raise PipelineError(
            f"model path {settings.path!r}: no such folder. Pebble's own code is run, so it is "
            "loaded from a folder on this machine, which you can read first."
        )
    for name in ("quantization", "vision_encoder", "attention"):
        if getattr(settings, name) is not None:
            raise PipelineError(f"model.{name}: not known for Pebble. Leave it out.")
    config = AutoConfig.from_pretrained(settings.path, trust_remote_code=True)
    with torch.device("meta"):
        skeleton = AutoModelForImageTextToText.from_config(config, trust_remote_code=True)
    PebbleAdapter().check(skeleton, tuple(stages), settings.path, settings.joint_encoder)
    model = AutoModelForImageTextToText.from_pretrained(
        settings.path, trust_remote_code=True, dtype=settings.torch_dtype, use_safetensors=True
    )
    processor = AutoProcessor.from_pretrained(settings.path, trust_remote_code=True)
    return model.to(settings.torch_device).eval(), processor
