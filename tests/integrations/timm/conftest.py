"""The adapter of timm, also where the installed distribution is older than its entry point."""

import tokenreduce_integrations.timm as plugin
from tokenreduce.plugins import installed

if "timm" not in installed().model_adapters:
    installed().load("timm", plugin)
