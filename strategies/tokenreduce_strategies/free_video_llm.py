"""Free Video-LLM's perception: the frames, and the region of each, that the prompt is about.

Idea: a question about a video is about some of its frames, and about a part of each. Find both by
the similarity of frames and patches to the question, in the space that the vision encoder shares
with text.

Algorithm, for T frames of P patches v, the prompt u in the shared space, and a budget of k:
    1. s[t, p] = cos(v[t, p], u);
    2. regions: in each frame, the ``points`` share of patches of largest s; a box of ``area`` of
       the frame around their mean position, moved back inside the frame;
    3. frames: m = ceil(k / box), at most T; half of them those whose mean token is most similar to
       u, the others evenly spaced among the rest;
    4. keep the k tokens of largest s among the boxes of these frames; if they hold fewer, tokens
       outside of them follow, by s.
If the budget is less than a box, boxes shrink to it. Ties go to the lowest index.

Shapes: features ``(B, T P, D)``, joint embeddings ``(B, T P, C)`` and ``(B, L, C)`` -> kept
``(B, k, D)``. Several prompt embeddings are averaged. Cost: O(N C).

Deviations from the official code: it pools regions in streams of different frame rate and
resolution, which changes what the LLM was trained to see; here tokens are kept as they are, and the
budget is exact. A twentieth of the patches says where a region is; there it is as large a share as
the region's, so that ``points=0.6`` is nearer to it. Regions (step 2, :func:`region_boxes`) equal
those of the official code on recorded cases.

Published: no number that could be verified.

```bibtex
@article{han2024freevideollm,
  title={Free {Video-LLM}: Prompt-guided Visual Perception for Efficient Training-free Video
         {LLMs}},
  author={Han, Kai and Guo, Jianyuan and Tang, Yehui and He, Wei and Wu, Enhua and Wang, Yunhe},
  journal={arXiv preprint arXiv:2410.10441},
  year={2024}
}
```
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from tokenreduce.errors import PipelineError
from tokenreduce.ops import top_k_indices, unit_vectors
from tokenreduce.ops.similarity import SMALLEST_NORM
from tokenreduce.reducer import Selector
from tokenreduce.tokens import VisualTokens


class Boxes(NamedTuple):
    """Regions of frames, each ``(...)`` integers; right and bottom lie outside."""

    left: Tensor
    top: Tensor
    right: Tensor
    bottom: Tensor


def region_boxes(points: Tensor, height: int, width: int, area: float) -> Boxes:
    """Boxes around the mean positions of points.

    Args:
        points: ``(..., k)`` integers, flat indices of patches of a frame.
        height: of the frame, in patches.
        width: likewise.
        area: share of the frame that a box takes; its sides are rounded, to at least one patch.
    """
    down, across = (max(1, round(side * area**0.5)) for side in (height, width))
    # Integer division of the sums: positions are not negative.
    left = (points % width).sum(-1) // points.shape[-1] - across // 2
    top = (points // width).sum(-1) // points.shape[-1] - down // 2
    left, top = left.clamp(0, width - across), top.clamp(0, height - down)
    return Boxes(left, top, left + across, top + down)


@dataclass(frozen=True, kw_only=True)
class FreeVideoLLM(Selector):
    """Keeps the frames, and the region of each, that are most similar to the prompt.

    Args:
        area: share of a frame that its region takes, in (0, 1].
        points: share of a frame's patches that say where its region is, in (0, 1].

    Raises:
        PipelineError: if an option is out of range.
    """

    area: float = 0.6
    points: float = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        for option in ("area", "points"):
            if not 0 < getattr(self, option) <= 1:
                raise PipelineError(
                    f"{self.name}: {option}={getattr(self, option)} must lie in (0, 1]."
                )

    def select(self, tokens: VisualTokens, k: int) -> Tensor:
        frames, height, width = tokens.require_grid(self.name)
        places = height * width
        embedded = tokens.signal("joint_image_embeddings").detach().float()
        text = unit_vectors(tokens.signal("joint_text_embeddings").detach().float().mean(1))
        clip = embedded.unflatten(1, (frames, places))
        score = _cosine(clip, text)
        most = max(1, int(self.points * places + 0.5))
        boxes = region_boxes(
            top_k_indices(score, most, scale=1.0), height, width, min(self.area, k / places)
        )
        y = torch.arange(height, device=score.device)[:, None].expand(height, width).flatten()
        x = torch.arange(width, device=score.device).repeat(height)
        left, top, right, bottom = (side[..., None] for side in boxes)
        inside = (x >= left) & (x < right) & (y >= top) & (y < bottom)
        wanted = min(frames, -(-k // int(inside[0, 0].sum())))
        shown = self.frames(_cosine(clip.mean(2), text), wanted)
        # Cosines span 2, so that regions come before all else.
        rank = score + 4 * (inside & shown[..., None])
        return top_k_indices(rank.flatten(1), k, scale=1.0)

    @staticmethod
    def frames(similarity: Tensor, count: int) -> Tensor:
        """Step 3: ``(B, T)`` booleans, from the similarity ``(B, T)`` of the frames."""
        chosen = torch.zeros_like(similarity, dtype=torch.bool)
        chosen.scatter_(1, top_k_indices(similarity, -(-count // 2), scale=1.0), True)
        rest = chosen.to(torch.uint8).argsort(dim=1, stable=True)
        rest = rest[:, : similarity.shape[1] - -(-count // 2)]
        even = (torch.arange(count // 2, device=rest.device) + 0.5) * rest.shape[1]
        return chosen.scatter(1, rest[:, (even / max(1, count // 2)).long()], True)


def _cosine(vectors: Tensor, text: Tensor) -> Tensor:
    """``(B, ...)`` cosines of vectors ``(B, ..., C)`` and texts ``(B, C)`` of unit length."""
    product = (vectors.flatten(1, -2) @ text[..., None]).squeeze(2).reshape(vectors.shape[:-1])
    cosine: Tensor = product / vectors.norm(dim=-1).clamp(min=SMALLEST_NORM)
    return cosine
