"""What an attachment could leave behind on a model."""

from __future__ import annotations

from typing import Any


def anatomy(model: Any) -> dict[str, Any]:
    """What every module holds, and the configuration."""
    trace: dict[str, Any] = {"config": model.config.to_dict()}
    for name, module in model.named_modules():
        plain = {
            key: id(value) if not isinstance(value, dict) else {k: id(v) for k, v in value.items()}
            for key, value in vars(module).items()
            # the stock models themselves remember the offset of their latest prompt
            if key != "rope_deltas"
        }
        trace[name] = (type(module), plain, id(module.forward.__func__))
    return trace
