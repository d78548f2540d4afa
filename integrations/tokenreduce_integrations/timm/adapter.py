"""Stages inside timm's vision transformers."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tokenreduce.errors import UnsupportedModel
from tokenreduce.tokens import Layout
from tokenreduce_integrations.encoders.adapter import EncoderAdapter
from tokenreduce_integrations.encoders.attachment import EncoderAttachment, Given
from tokenreduce_integrations.encoders.dense import Sequences
from tokenreduce_integrations.transformers.layouts import grid_layout


class TimmAttachment(EncoderAttachment):
    """A pipeline on a vision transformer of timm.

    ``forward_intermediates`` gives intermediates of the usual shape.
    """

    entries: ClassVar[tuple[str, ...]] = ("forward_features", "forward_intermediates")

    def _prefix(self) -> int:
        return int(self.encoder.num_prefix_tokens)

    def _pools_patches(self) -> bool:
        pooled = self.encoder.global_pool not in ("", "token")
        return pooled or self.encoder.attn_pool is not None

    def _shows_all(self, entry: str, given: Given) -> bool:
        return entry == "forward_intermediates"

    def _refuse(self) -> None:
        encoder = self.encoder
        if not encoder.training:
            return
        if encoder.grad_checkpointing:
            raise UnsupportedModel(
                f"{type(encoder).__name__} recomputes its blocks in the backward pass (gradient "
                "checkpointing), where stages inside them could not act again. Call "
                "set_grad_checkpointing(False) while the pipeline is attached."
            )
        dropping = getattr(encoder, "patch_drop", None)
        if type(encoder).__name__ == "NaFlexVit" and dropping is not None:
            raise UnsupportedModel(
                "NaFlexVit drops patches at random in training: which of them are padding is then "
                "known inside the model only. Set patch_drop_rate to 0, or call eval()."
            )

    def _describe(self, given: Given, batch: int, length: int) -> Sequences:
        prefix = self._prefix()
        image: Any = given.get("x", given.get("patches"))
        owners = tuple(range(batch))
        coords, valid = given.get("patch_coord"), given.get("patch_valid")
        if isinstance(image, dict):
            coords, valid = image["patch_coord"], image.get("patch_valid", valid)
        if coords is not None:
            valid = torch.ones(coords.shape[:2], dtype=torch.bool) if valid is None else valid
            layouts = [_patch_layout(c, v) for c, v in zip(coords, valid.bool(), strict=True)]
            return Sequences(
                layouts=tuple(layouts), owners=owners, prefix=prefix, valid=valid.bool()
            )
        embeds = getattr(self.encoder, "embeds", None) or self.encoder.patch_embed
        grid = embeds.dynamic_feat_size(tuple(image.shape[-2:]))
        layout = grid_layout([int(side) for side in grid], length - prefix)
        return Sequences(layouts=(layout,) * batch, owners=owners, prefix=prefix)


class TimmAdapter(EncoderAdapter):
    """VisionTransformer, Eva and NaFlexVit, and transformers' wrappers of them."""

    attachment = TimmAttachment

    def _encoder(self, model: nn.Module) -> Any:
        encoder = getattr(model, "timm_model", model)
        if not hasattr(encoder, "forward_features"):
            raise UnsupportedModel(
                f"{type(model).__name__} wraps a {type(encoder).__name__} for features only: "
                "attach to a whole vision transformer of timm."
            )
        return encoder


def _patch_layout(coords: Tensor, valid: Tensor) -> Layout:
    """Where the real patches of a NaFlex image lie, given (y, x) of each."""
    places = coords[valid].cpu().long()
    return Layout(torch.cat([torch.zeros_like(places), places], dim=1))
