"""One thread: the models are tiny, and contention between threads costs more than it gives."""

import torch

import tokenreduce_integrations.timm as timm_plugin
from tokenreduce.plugins import installed

torch.set_num_threads(1)

# An editable installation made before timm's entry point was declared does not know it.
if "timm" not in installed().model_adapters:
    installed().load("timm", timm_plugin)
