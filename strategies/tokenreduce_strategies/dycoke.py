"""DyCoke, temporal part: in groups of four frames, later ones keep what their forerunner lacks.

Idea: cut the clip into groups of four frames. The first of a group stays whole; the second and the
fourth drop what the frame before them shows, the third what the first shows.

Algorithm, for T frames of P places with tokens x[t, p] and a budget of k:
    1. the reference of frame t is t - 1 for odd t, and t - 2 for t = 2 mod 4; frames with t = 0
       mod 4 are anchors. s[t, p] = cos(x[t, p], x[ref(t), p]);
    2. anchors stay whole, and the other frames share what is left of k alike, the first ones one
       token more where it does not divide; each keeps its tokens of lowest s;
    3. if k does not hold the anchors: drop all other frames, and treat the anchors in the same
       way, as a clip of every fourth frame; and so on up to a single frame, of which, with k < P,
       the places are kept that ``uniform`` would choose.
Nothing is averaged. Output in source order. Ties go to the lowest index.

Shapes: features ``(B, T P, D)`` -> s ``(B, T, P)`` -> kept ``(B, k, D)``. Cost: O(N D).

Deviations from the official code: it takes a ratio m instead of a budget, keeps int((1 - m) P)
tokens of each frame that is not an anchor, keeps the third frame of the last group whole if T is a
multiple of 4, loses the last frame of an odd T, lists kept tokens by rising similarity, and fails
for fewer than 5 frames. ``official=True`` keeps the same tokens, in source order. Its second stage,
which prunes the key-value cache while the LLM decodes, is not part of this strategy. Kept tokens
equal those of the official code on recorded cases.

Published: up to 1.5x faster inference (abstract); no comparable table.

```bibtex
@inproceedings{tao2025dycoke,
  title={{DyCoke}: Dynamic Compression of Tokens for Fast Video Large Language Models},
  author={Tao, Keda and Qin, Can and You, Haoxuan and Sui, Yang and Wang, Huan},
  booktitle={Proceedings of the IEEE/CVF Conference on Computer Vision and Pattern Recognition},
  year={2025},
  eprint={2411.15024},
  archivePrefix={arXiv}
}
```
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from tokenreduce.capabilities import CountClass
from tokenreduce.errors import PipelineError, TokensError
from tokenreduce.ops.frames import same_place_cosine
from tokenreduce.ops.quotas import kept_indices, top_mask
from tokenreduce.reducer import Reducer
from tokenreduce.reduction import Reduction
from tokenreduce.tokens import VisualTokens
from tokenreduce_strategies.uniform import Uniform

#: Frames of a group.
GROUP = 4


@dataclass(frozen=True, kw_only=True)
class DyCoke(Reducer):
    """Keeps the first of four frames, and of the others what differs from their reference.

    Args:
        official: keep what the official code keeps; ``merging_ratio`` then stands for a budget.
        merging_ratio: share of the tokens that a frame other than an anchor loses, in (0, 1); only
            with ``official``.

    Raises:
        PipelineError: if ``merging_ratio`` is out of range or comes without ``official``, or
            ``official`` with a budget.
    """

    official: bool = False
    merging_ratio: float = 0.7

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.merging_ratio < 1:
            raise PipelineError(f"dycoke: merging_ratio={self.merging_ratio} lies in (0, 1).")
        if self.official and self.budget is not None:
            raise PipelineError(
                f"dycoke: with official=True the count follows from merging_ratio, not from "
                f"{self.budget}. Give one of them."
            )
        if not self.official and self.merging_ratio != type(self).merging_ratio:
            raise PipelineError("dycoke: merging_ratio is read with official=True alone.")

    @property
    def count_class(self) -> CountClass:
        return "layout" if self.official else "exact"

    @property
    def decides_alone(self) -> bool:
        return self.official

    def reduce(self, tokens: VisualTokens) -> Reduction:
        """Keep anchors, and what differs from the reference.

        Raises:
            TokensError: if the tokens do not form a full grid, or for fewer than 5 frames with
                ``official``.
        """
        frames, height, width = tokens.require_grid(self.name)
        places = height * width
        if self.official:
            counts = official_counts(frames, places, self.merging_ratio)
            return Reduction.from_kept(tokens, _differing(tokens, counts, 1))
        k = self.count(tokens.count)
        if k < places:
            first = torch.arange(places, device=tokens.features.device)
            return Reduction.from_kept(tokens, Uniform().select(tokens.select(first), k))
        counts, stride = shared_counts(frames, places, k)
        return Reduction.from_kept(tokens, _differing(tokens, counts, stride))


def shared_counts(frames: int, places: int, k: int) -> tuple[list[int], int]:
    """How many tokens each frame keeps of a budget of at least one frame.

    Returns:
        the counts, and the stride at which frames count as neighbours: 1, or a power of four.
    """
    stride = 1
    while len(range(0, frames, GROUP * stride)) * places > k:
        stride *= GROUP
    anchors = range(0, frames, GROUP * stride)
    others = [t for t in range(0, frames, stride) if t not in anchors]
    counts = [places if t in anchors else 0 for t in range(frames)]
    share, more = divmod(k - len(anchors) * places, max(1, len(others)))
    for rank, t in enumerate(others):
        counts[t] = share + (rank < more)
    return counts, stride


def official_counts(frames: int, places: int, merging_ratio: float) -> list[int]:
    """How many tokens of each frame the official code keeps.

    Raises:
        TokensError: for fewer than 5 frames, of which it makes nothing.
    """
    if frames <= GROUP:
        raise TokensError(
            f"dycoke: the official code takes at least {GROUP + 1} frames, got {frames}. Use "
            "official=False with a budget."
        )
    counts = [places] * frames
    for t in (*range(1, frames, 2), *(i + 2 for i in range(0, frames - GROUP, GROUP))):
        counts[t] = int((1 - merging_ratio) * places)
    if frames % 2:
        counts[-1] = 0
    return counts


def _differing(tokens: VisualTokens, counts: list[int], stride: int) -> Tensor:
    """``(B, k)`` indices: of each frame, so many tokens that differ most from its reference."""
    # A digit in base four says which frame of its group a frame is: 1 looks at 0, 2 at 0, 3 at 2.
    back = [(0, 1, 2, 1)[t // stride % GROUP] * stride for t in range(len(counts))]
    clip = tokens.features.detach().unflatten(1, (len(counts), -1))
    same = same_place_cosine(clip, [t - step for t, step in enumerate(back)])
    each = torch.tensor(counts, device=same.device).expand(same.shape[:2])
    return kept_indices(top_mask(-same, each, scale=1.0).flatten(1))
