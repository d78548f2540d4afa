"""Pictures and text to the inputs of Pebble."""

import numpy as np
import torch
from transformers import BatchFeature, ProcessorMixin


class PebbleProcessor(ProcessorMixin):
    """Cuts pictures to whole patches and writes an image token for each.

    Args:
        tokenizer: of the text model; it knows the token ``<image>``.
        patch_size: pixels of a side of a patch.
    """

    attributes = ["tokenizer"]  # noqa: RUF012 (as transformers declares it)
    tokenizer_class = "AutoTokenizer"

    def __init__(self, tokenizer=None, patch_size=14, **kwargs):
        self.patch_size = patch_size
        self.image_token = "<image>"
        super().__init__(tokenizer, **kwargs)

    def __call__(self, images=None, text=None, return_tensors="pt", **kwargs):
        pixels = np.asarray(images, dtype=np.float32)
        height, width = (side // self.patch_size for side in pixels.shape[:2])
        pixels = pixels[: height * self.patch_size, : width * self.patch_size]
        placeholders = " ".join([self.image_token] * (height * width))
        tokens = self.tokenizer(
            text.replace(self.image_token, placeholders), return_tensors=return_tensors, **kwargs
        )
        picture = torch.from_numpy(pixels / 127.5 - 1).permute(2, 0, 1)[None]
        return BatchFeature({**tokens, "pixel_values": picture})
