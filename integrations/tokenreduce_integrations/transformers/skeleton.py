"""Models without weights."""

from __future__ import annotations

from typing import Any

import torch

from tokenreduce_integrations.pruning.surgery import SurgeryPlan, cut_class, restore_class


def skeleton_of(config: Any, plan: SurgeryPlan | None = None) -> Any:
    """A model without weights (meta device), in evaluation mode.

    Args:
        config: a transformers configuration of a multimodal model.
        plan: what was cut out of its vision encoder, if anything was.
    """
    from transformers import AutoModelForImageTextToText

    with torch.device("meta"):
        model: Any = AutoModelForImageTextToText.from_config(  # type: ignore[no-untyped-call]
            config, trust_remote_code=False
        )
        if plan is not None:
            own = type(model)
            model = cut_class(own, plan)(config)
            restore_class(model, own)
    return model.eval()
