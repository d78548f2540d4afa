"""The space that a vision-text encoder shares between images and text.

Multimodal LLMs keep the vision tower of such an encoder and leave out what leads into the joint
space: the projection of patches, and the text tower. Both come from the encoder itself, by name.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tokenreduce.errors import MissingSignal, PipelineError

_FIELDS = ("hidden_size", "intermediate_size", "num_attention_heads", "patch_size")


class JointEncoder:
    """What leads from a vision tower's patches, and from text, into the joint space.

    CLIP: patches go through the tower's last norm and the visual projection. SigLIP has no
    projection but a pooling head: patches go through the last norm and the head, each as if it
    were the only patch of its image.

    Args:
        model: a ``CLIPModel`` or ``SiglipModel``.
        tokenizer: its tokenizer.

    Raises:
        PipelineError: if the model is something else.
    """

    def __init__(self, model: Any, tokenizer: Any) -> None:
        vision = getattr(model, "vision_model", None)
        self._norm: Any = getattr(vision, "post_layernorm", None)
        self._projection: Any = getattr(model, "visual_projection", None)
        self._head: Any = getattr(vision, "head", None)
        leads = self._projection is not None or self._head is not None
        if self._norm is None or not leads or not hasattr(model, "get_text_features"):
            raise PipelineError(
                f"joint_encoder: {type(model).__name__} is no vision-text encoder whose patches "
                "have embeddings in the space of its text. Give a CLIPModel or a SiglipModel."
            )
        self.vision_config = model.config.vision_config
        self._model = model
        self._tokenizer = tokenizer
        self._longest = int(model.config.text_config.max_position_embeddings)

    @classmethod
    def load(cls, source: Any, device: torch.device) -> JointEncoder:
        """Take a loaded encoder, or load one.

        Args:
            source: a folder or a hub name, or a loaded model and its tokenizer.
            device: where an encoder that is loaded here goes.

        Raises:
            PipelineError: if it cannot be loaded, or is no vision-text encoder.
        """
        if isinstance(source, tuple) and len(source) == 2:
            return cls(*source)
        name = _name(source)
        from transformers import AutoModel, AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
            model = AutoModel.from_pretrained(name, use_safetensors=True, trust_remote_code=False)
        except (OSError, ValueError, ImportError, KeyError) as error:
            raise _unloadable(name, error) from error
        encoder = cls(model, tokenizer)
        # The model that is reduced has the tower already.
        model.vision_model.encoder = nn.Identity()
        model.to(device).eval()
        return encoder

    @staticmethod
    def config_of(source: Any) -> Any:
        """The vision configuration of an encoder, without reading weights.

        Raises:
            PipelineError: if there is none.
        """
        if isinstance(source, tuple) and len(source) == 2:
            config = source[0].config
        else:
            from transformers import AutoConfig

            name = _name(source)
            try:
                config = AutoConfig.from_pretrained(name, trust_remote_code=False)
            except (OSError, ValueError, KeyError) as error:
                raise _unloadable(name, error) from error
        vision = getattr(config, "vision_config", None)
        if vision is None or not JointEncoder.may_share(vision):
            raise PipelineError(
                f"joint_encoder: {config.model_type!r} is no vision-text encoder that TokenReduce "
                "knows. Give a CLIP or a SigLIP model."
            )
        return vision

    @staticmethod
    def may_share(vision_config: Any) -> bool:
        """Whether towers of this kind are parts of vision-text encoders."""
        return getattr(vision_config, "model_type", "") in (
            "clip_vision_model",
            "siglip_vision_model",
        )

    @staticmethod
    def require_same_tower(own: Any, encoder: Any) -> None:
        """Check that a model's tower is that of an encoder, as far as shapes tell.

        The model may have dropped the last layers.

        Raises:
            MissingSignal: naming what differs.
        """
        differ = [
            f"{name} {getattr(own, name, None)} and {getattr(encoder, name, None)}"
            for name in ("model_type", *_FIELDS)
            if getattr(own, name, None) != getattr(encoder, name, None)
        ]
        if own.num_hidden_layers > encoder.num_hidden_layers:
            differ.append(
                f"num_hidden_layers {own.num_hidden_layers} and {encoder.num_hidden_layers}"
            )
        if differ:
            raise MissingSignal(
                "the vision tower of the model is not that of the joint encoder "
                f"({'; '.join(differ)}). Give the encoder that the tower was taken from."
            )

    @torch.no_grad()
    def embed_patches(self, states: Tensor) -> Tensor:
        """Patches in the joint space.

        Args:
            states: ``(T, S, C)`` hidden states as the projector reads them; of several layers end
                to end, the last counts.

        Returns:
            ``(T, S, E)``, neither pooled nor normalized.
        """
        weight = self._norm.weight
        states = states[..., -weight.shape[0] :]
        normed = self._norm(states.to(weight))
        embedded: Tensor
        if self._projection is not None:
            embedded = self._projection(normed)
        else:
            embedded = self._head(normed.flatten(0, 1)[:, None]).unflatten(0, states.shape[:2])
        return embedded.to(states.device)

    @torch.no_grad()
    def embed_text(self, text: str) -> Tensor:
        """A prompt in the joint space.

        Returns:
            ``(P, E)``: one embedding for each part of the text that fits into the text tower, not
            normalized.
        """
        tokenizer = self._tokenizer
        whole = tokenizer(text)["input_ids"]
        bare = tokenizer(text, add_special_tokens=False)["input_ids"]
        frames = range(len(whole) - len(bare) + 1)
        before = next((i for i in frames if whole[i : i + len(bare)] == bare), None)
        if before is None:
            raise PipelineError(
                f"joint_encoder: {type(tokenizer).__name__} does not put its special tokens before "
                "and after a text, so a long prompt cannot be cut for it. Use its own tokenizer."
            )
        after = whole[before + len(bare) :]
        room = self._longest - before - len(after)
        parts = [bare[i : i + room] for i in range(0, len(bare), room)] or [[]]
        # SigLIP was trained on padded text.
        batch = tokenizer.pad(
            {"input_ids": [[*whole[:before], *part, *after] for part in parts]},
            padding="max_length",
            max_length=self._longest,
            return_tensors="pt",
        )
        device = next(self._model.parameters()).device
        inputs = {n: t.to(device) for n, t in batch.items() if n in tokenizer.model_input_names}
        embedded: Tensor = self._model.get_text_features(**inputs).pooler_output
        return embedded


def _name(source: Any) -> str:
    if not isinstance(source, str) or not source:
        raise PipelineError(
            "joint_encoder must be a folder, a hub name such as "
            "'openai/clip-vit-large-patch14-336', or a loaded model and its tokenizer, got "
            f"{type(source).__name__}."
        )
    return source


def _unloadable(name: str, error: Exception) -> PipelineError:
    reason = " ".join(str(error).split())[:400].rstrip(".") or type(error).__name__
    return PipelineError(
        f"joint_encoder {name!r} cannot be loaded: {reason}. Give a folder or a hub name that has "
        "safetensors weights, or load the encoder yourself and pass (model, tokenizer)."
    )
