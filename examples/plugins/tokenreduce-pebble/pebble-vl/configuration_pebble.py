"""Configuration of Pebble."""

from transformers import AutoConfig, PretrainedConfig


class PebbleConfig(PretrainedConfig):
    """A convolutional encoder of patches before a text model.

    Args:
        text_config: of the text model.
        patch_size: pixels of a side of a patch.
        vision_width: channels of the encoder.
        image_token_id: the token that stands for each patch in the prompt.
    """

    model_type = "pebble"
    sub_configs = {"text_config": AutoConfig}  # noqa: RUF012 (as transformers declares it)

    def __init__(
        self, text_config=None, patch_size=14, vision_width=48, image_token_id=3, **kwargs
    ):
        given = dict(text_config or {}) if not hasattr(text_config, "to_dict") else None
        if given is not None:
            text_config = AutoConfig.for_model(given.pop("model_type", "llama"), **given)
        self.text_config = text_config
        self.patch_size = patch_size
        self.vision_width = vision_width
        self.image_token_id = image_token_id
        super().__init__(**kwargs)
