"""timm's ViTs as towers of LLaVA-style models.

``TimmWrapperModel`` hands hidden states on as maps ``(B, C, H, W)`` without class and register
tokens, where a LLaVA projector reads sequences ``(B, N, C)``: unchanged, the model fails, or reads
columns of the map as channels. A hook on the tower's instance turns each map into a sequence.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from tokenreduce.errors import UnsupportedModel

_WRAPPER = "TimmWrapperModel"


def adapt_timm_tower(model: nn.Module) -> bool:
    """Make a model whose vision tower is a timm ViT run; any other model stays as it is.

    Returns:
        whether the tower is one, and hands sequences on now.

    Raises:
        UnsupportedModel: if the model would drop a patch, taking it for a class token.
    """
    owner: Any = getattr(model, "model", model)
    tower: Any = getattr(owner, "vision_tower", None)
    if type(tower).__name__ != _WRAPPER:
        return False
    strategy = getattr(owner.config, "vision_feature_select_strategy", "full")
    if strategy != "full":
        raise UnsupportedModel(
            f"{type(model).__name__} with a timm tower and vision_feature_select_strategy="
            f"{strategy!r}: timm hands no class token on, so the first patch would be dropped in "
            "its place. Set vision_feature_select_strategy to 'full' in config.json."
        )
    if _hand_sequences_on not in tower._forward_hooks.values():
        tower.register_forward_hook(_hand_sequences_on)
    return True


def _hand_sequences_on(_: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    if output.hidden_states is not None:
        output.hidden_states = tuple(_sequence(state) for state in output.hidden_states)
    return output


def _sequence(state: Tensor) -> Tensor:
    return state.flatten(2).transpose(1, 2) if state.ndim == 4 else state
