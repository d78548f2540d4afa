"""How a model says in which columns of its sequence visual features stand."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

MODALITIES = ("image", "video")


def returned_masks(owner: Any, output: Any, arguments: Mapping[str, Any]) -> dict[str, Tensor]:
    """The masks that ``get_placeholder_mask`` returned, for the modalities that have features.

    Some families call it for one token at a time. Some do not hand it the features: then every mask
    counts, and which modalities were encoded decides later.
    """
    if "token_id" in arguments:
        token = arguments["token_id"]
        names = (name for name in MODALITIES if _token_of(owner, name) == token)
        return dict.fromkeys(names, output)
    masks = output if isinstance(output, tuple) else (output,)
    told = names_features(arguments)
    return {
        modality: masks[index] if len(masks) > 1 else masks[0]
        for index, modality in enumerate(MODALITIES)
        if not told or arguments.get(f"{modality}_features") is not None
    }


def names_features(arguments: Mapping[str, Any]) -> bool:
    """Whether a call says which features it places."""
    return any(name == "features" or name.endswith("_features") for name in arguments)


def _token_of(owner: Any, modality: str) -> int | None:
    token: int | None = getattr(owner.config, f"{modality}_token_id", None)
    return token


def image_tokens(owner: Any, output: Any, arguments: Mapping[str, Any]) -> dict[str, Tensor]:
    """Where the prompt has the image token, for families that compute the mask while merging."""
    ids = arguments.get("input_ids")
    if ids is not None:
        return {"image": ids == owner.config.image_token_id}
    embeds = arguments["inputs_embeds"]
    token = embeds.new_tensor(owner.config.image_token_id).long()
    return {"image": (embeds == owner.get_input_embeddings()(token)).all(-1)}


@dataclass(frozen=True, kw_only=True)
class Placement:
    """The method that places visual features.

    Attributes:
        method: its name; wrapped on the instance that owns it.
        masks: called with the owner, what the method returned, and its arguments; gives the
            columns ``(B, S)`` or ``(B, S, D)`` of each modality.
        runs: whether each run of placeholders is an item, for families whose encoder is given
            single tokens and is not told which belong together.
    """

    method: str = "get_placeholder_mask"
    masks: Callable[[Any, Any, Mapping[str, Any]], dict[str, Tensor]] = returned_masks
    runs: bool = False


PLACEHOLDERS = Placement()
MERGER = Placement(method="inputs_merger", masks=image_tokens)
