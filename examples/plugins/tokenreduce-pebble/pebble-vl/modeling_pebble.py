"""Pebble: patches, three layers of mixing, and a text model behind them."""

from torch import nn
from transformers import AutoModelForCausalLM, GenerationMixin, PreTrainedModel

from .configuration_pebble import PebbleConfig


class PebbleEncoder(nn.Module):
    """Pixels ``(B, 3, H, W)`` to features ``(B, N, D)`` in the space of the text model."""

    def __init__(self, config):
        super().__init__()
        width = config.vision_width
        self.patches = nn.Conv2d(3, width, config.patch_size, config.patch_size)
        self.mixing = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(3))
        self.projector = nn.Linear(width, config.text_config.hidden_size)

    def forward(self, pixel_values):
        x = self.patches(pixel_values)
        for mix in self.mixing:
            x = x + mix(nn.functional.gelu(x))
        return self.projector(x.flatten(2).transpose(1, 2))


class PebbleForConditionalGeneration(PreTrainedModel, GenerationMixin):
    """Images and text to text."""

    config_class = PebbleConfig
    base_model_prefix = "pebble"
    _supports_sdpa = True

    def __init__(self, config):
        super().__init__(config)
        self.encoder = PebbleEncoder(config)
        self.llm = AutoModelForCausalLM.from_config(config.text_config)
        self.post_init()

    def get_input_embeddings(self):
        return self.llm.get_input_embeddings()

    def get_output_embeddings(self):
        return self.llm.get_output_embeddings()

    def get_decoder(self):
        return self.llm.model

    def get_image_features(self, pixel_values):
        return self.encoder(pixel_values)

    def splice(self, input_ids, inputs_embeds, image_features):
        """Put features where the image token stands."""
        where = (input_ids == self.config.image_token_id)[..., None].expand_as(inputs_embeds)
        return inputs_embeds.masked_scatter(where, image_features.to(inputs_embeds.dtype))

    def forward(
        self,
        input_ids=None,
        pixel_values=None,
        attention_mask=None,
        inputs_embeds=None,
        **kwargs,
    ):
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        if pixel_values is not None:
            features = self.get_image_features(pixel_values)
            inputs_embeds = self.splice(input_ids, inputs_embeds, features)
        return self.llm(inputs_embeds=inputs_embeds, attention_mask=attention_mask, **kwargs)

    def prepare_inputs_for_generation(
        self, input_ids, pixel_values=None, is_first_iteration=False, **kwargs
    ):
        inputs = super().prepare_inputs_for_generation(
            input_ids, is_first_iteration=is_first_iteration, **kwargs
        )
        # Later steps read the image from the cache.
        inputs["pixel_values"] = pixel_values if is_first_iteration else None
        return inputs
