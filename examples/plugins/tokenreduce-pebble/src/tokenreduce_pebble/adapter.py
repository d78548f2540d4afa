"""What is special about Pebble: how it places features, and where its tokens lie."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from tokenreduce import Layout
from tokenreduce_integrations.transformers.adapters import TransformersAdapter
from tokenreduce_integrations.transformers.families import Family
from tokenreduce_integrations.transformers.placement import Placement, image_tokens


def patches(owner: Any, features: Sequence[Tensor], arguments: Mapping[str, Any]) -> list[Layout]:
    """Rows and columns of patches, from the pixels that the encoding call was given."""
    rows, columns = (
        side // owner.config.patch_size for side in arguments["pixel_values"].shape[2:]
    )
    return [Layout.from_grid((rows, columns)) for _ in features]


def bare_features(output: Any) -> Any:
    """Pebble's encoding call returns the features themselves."""
    return output


class PebbleAdapter(TransformersAdapter):
    """Pebble: features go where the image token stands, by a method called ``splice``."""

    family = Family(
        name="Pebble",
        layouts={"image": patches},
        placement=Placement(method="splice", masks=image_tokens),
        features=bare_features,
    )
