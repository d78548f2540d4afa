"""Lets a torchvision whose compiled operators cannot load be imported.

Package indexes hold torchvision as it is built for CUDA. Beside a torch for CPUs its library of
operators does not load, which it expects, except where it registers fake kernels for two of them.
vLLM needs no operator of torchvision, but it cannot import its multimodal models without the
package. This module declares the two operators before torchvision asks for them. The session
``vllm`` of nox puts it into the test environment, and nothing else uses it.
"""

from __future__ import annotations

import sys
from typing import Any


class _Declaring:
    """Finds no module; sees when torchvision is about to register fake kernels."""

    library: Any = None

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name != "torchvision._meta_registrations" or self.library is not None:
            return
        import torch

        if hasattr(torch.ops.torchvision, "nms"):
            return
        self.library = torch.library.Library("torchvision", "FRAGMENT")
        self.library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        self.library.define(
            "qnms(Tensor dets, Tensor scores, float dets_scale, int dets_zero_point, "
            "Tensor scores_scale, float iou_threshold) -> Tensor"
        )


sys.meta_path.insert(0, _Declaring())  # type: ignore[arg-type]
