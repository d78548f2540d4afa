"""Pipelines as a model of lmms-eval, by its entry point: any of its tasks, no fork.

lmms-eval --model tokenreduce --model_args pipeline=pipeline.yaml --tasks mme --batch_size 8
"""

from typing import Any


def manifests() -> list[Any]:
    """What lmms-eval loads through the entry-point group ``lmms_eval.models``."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return [
        ModelManifest(
            model_id="tokenreduce",
            chat_class_path=f"{__name__}.model.TokenReduceChat",
            simple_class_path=f"{__name__}.model.TokenReduceSimple",
        )
    ]
