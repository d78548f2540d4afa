"""Writing the model of a pipeline to a folder that loading reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenreduce.errors import PipelineError
from tokenreduce.pipeline import ModelSettings
from tokenreduce_integrations.pruning.surgery import plan_of
from tokenreduce_integrations.quantization.stored import save_weights
from tokenreduce_integrations.transformers.files import PLAN_FILE


def save_model(model: Any, processor: Any, folder: Path, settings: ModelSettings) -> None:
    """Write a model as it is, pruned and quantized, with its processor and its surgery plan.

    Args:
        model: the model, with or without stages attached.
        processor: its processor.
        folder: made if it is not there.
        settings: how the model was loaded.

    Raises:
        PipelineError: if its pruner left no plan by which it can be built again, there are
            adapters of peft on it, or the folder cannot be written.
    """
    if any(type(module).__module__.startswith("peft.") for module in model.modules()):
        raise PipelineError(
            f"there are adapters of peft on this {type(model).__name__}, which would be saved "
            "without the model or under other names. Merge them (merge_and_unload), or remove them "
            "and save them by themselves."
        )
    plan, pruner = plan_of(model), settings.encoder_pruner
    if pruner is not None and plan is None:
        raise PipelineError(
            f"encoder pruner {pruner.backend!r} left no surgery plan, so that what it pruned could "
            "not be loaded again. It has to cut by SurgeryPlan.apply."
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_weights(model, folder)
        processor.save_pretrained(folder)
        # A plan of what was saved here before would be taken for that of these weights.
        (folder / PLAN_FILE).unlink(missing_ok=True)
        if plan is not None:
            plan.save(folder)
    except OSError as error:
        raise PipelineError(f"folder {str(folder)!r} cannot be written: {error}.") from error
