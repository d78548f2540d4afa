"""The prompt of a clip that was reduced: what is left of it, at the positions of the whole one."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import Tensor

from tokenreduce.errors import MediaError, UnsupportedModel
from tokenreduce.tokens import Layout
from tokenreduce_integrations.cli import chat
from tokenreduce_integrations.video.forms import ClipForm


@dataclass(frozen=True)
class ClipPrompt:
    """A prompt with one clip, which stands in one run of placeholders, or in one for each moment.

    Attributes:
        texts: ids ``(L,)`` before, between and after its runs.
        placeholder: the id of the clip's tokens.
        grid: (T, H, W) in tokens of the whole clip.
        end: tokens at its end that belong to no frame.
    """

    texts: tuple[Tensor, ...]
    placeholder: int
    grid: tuple[int, int, int]
    end: int = 0

    @property
    def runs(self) -> int:
        """How many runs there are."""
        return len(self.texts) - 1

    @property
    def length(self) -> int:
        """Tokens of the whole prompt."""
        return sum(map(len, self.texts)) + prod(self.grid) + self.end

    def ids(self, coords: Tensor) -> Tensor:
        """``(S,)`` with placeholders for the tokens that are left.

        Args:
            coords: ``(K, 4)`` their (block, t, y, x), ascending.
        """
        counts = self._run_of(coords).bincount(minlength=self.runs)
        counts[-1] += self.end
        return self._woven(
            self.texts,
            [self.texts[0].new_full((count,), self.placeholder) for count in counts.tolist()],
        )

    def positions(self, coords: Tensor, places: Places) -> Tensor:
        """``(axes, S)`` positions in the whole prompt of what :meth:`ids` gives."""
        run = self._run_of(coords)
        lengths = torch.tensor([len(text) for text in self.texts])
        starts = lengths.cumsum(0)[:-1] + torch.arange(self.runs) * places.advance
        stops = starts + places.advance
        _, t, y, x = coords.unbind(1)
        visual = starts[run] + places.local(t - run * self._moments, y, x)
        end = torch.arange(int(stops[-1]) - self.end, int(stops[-1])).expand(len(visual), -1)
        texts = [
            torch.arange(start, start + length).expand(len(visual), -1)
            for start, length in zip([0, *stops.tolist()], lengths.tolist(), strict=True)
        ]
        *others, last = visual.split(run.bincount(minlength=self.runs).tolist(), dim=1)
        return self._woven(texts, [*others, torch.cat([last, end], dim=1)])

    @property
    def _moments(self) -> int:
        """Moments in each run."""
        return self.grid[0] // self.runs

    def _run_of(self, coords: Tensor) -> Tensor:
        return coords[:, 1] // self._moments

    @staticmethod
    def _woven(texts: Sequence[Tensor], runs: Sequence[Tensor]) -> Tensor:
        """A text, a run, a text, and so on."""
        pairs = zip(texts, runs, strict=False)
        return torch.cat([part for pair in pairs for part in pair] + [texts[-1]], dim=-1)


@dataclass(frozen=True)
class Places:
    """Positions within a run.

    Attributes:
        local: ``(axes, K)`` of tokens at (t, y, x), from where the run begins; t counts from its
            first moment.
        advance: from there to the text behind the run.
    """

    local: Callable[[Tensor, Tensor, Tensor], Tensor]
    advance: int


def write_prompt(
    processor: Any,
    form: ClipForm,
    question: str,
    *,
    grid: tuple[int, int, int],
    end: int,
    frame: Sequence[int],
    frames: int,
    fps: float,
) -> ClipPrompt:
    """The prompt that the model's own processor writes about a clip.

    Args:
        processor: the model's.
        form: how the model takes clips.
        question: about the clip.
        grid: (T, H, W) in tokens of the whole clip.
        end: tokens at its end that belong to no frame.
        frame: shape of a frame that is encoded, see :class:`Chunk`.
        frames: pictures of the clip.
        fps: of them a second.

    Raises:
        PipelineError: if the processor has no chat template.
        MediaError: if the question contains the token that stands for a clip.
        UnsupportedModel: if the processor writes something else than the form says.
    """
    from transformers.video_utils import VideoMetadata

    text = chat.write(processor, "video", question)
    if text.count(processor.video_token) != 1:
        raise MediaError(
            f"the question contains {processor.video_token!r}, which stands for a clip. Leave that "
            "out."
        )
    inputs = form.stand_in(processor.video_processor, frame, grid[0] if form.separated else 1)
    metadata = VideoMetadata(frames, fps=fps, frames_indices=list(range(frames)))
    words: str = processor.replace_video_token({**inputs, "video_metadata": [metadata]}, 0)
    token, placeholder = (
        getattr(processor, f"{form.token}_{name}") for name in ("token", "token_id")
    )
    # One placeholder for each run: the tokens of a long clip would take room as text.
    words = re.sub(f"(?:{re.escape(token)})+", lambda run: token, words)
    tokenizer = processor.tokenizer
    special = tokenizer.bos_token is None or not text.startswith(tokenizer.bos_token)
    text = text.replace(processor.video_token, words)
    ids = torch.tensor(tokenizer(text, add_special_tokens=special)["input_ids"])
    runs = (ids == placeholder).nonzero().squeeze(1).tolist()
    if len(runs) != (grid[0] if form.separated else 1):
        raise UnsupportedModel(
            f"{type(processor).__name__} writes a clip of {grid[0]} moments as {len(runs)} runs of "
            f"{token!r}: it is of a release that this adapter does not know. Give a folder of "
            "frames."
        )
    bounds = zip([-1, *runs], [*runs, len(ids)], strict=True)
    return ClipPrompt(
        tuple(ids[before + 1 : after] for before, after in bounds), placeholder, grid, end
    )


def places_in(model: Any, processor: Any, form: ClipForm, prompt: ClipPrompt, fps: float) -> Places:
    """Where a model puts the tokens of a clip.

    A model with rotary positions (t, y, x) is itself asked for those of a clip of one moment and of
    two: each further one moves on by the same step, and so does the text behind the clip.

    Raises:
        UnsupportedModel: if that text does not.
    """
    moments, h, w = prompt.grid
    if not hasattr(model.model, "get_rope_index"):
        each = moments // prompt.runs * h * w
        return Places(lambda t, y, x: ((t * h + y) * w + x)[None], each + prompt.end)
    first, last = prompt.texts[0], prompt.texts[-1]
    one = replace(prompt, grid=(1, h, w), texts=(first, last))
    between = prompt.texts[1:2] if form.separated else ()
    two = replace(prompt, grid=(2, h, w), texts=(first, *between, last))
    cell, following = (_asked(model, processor, clip, fps) for clip in (one, two))
    start, stop = len(first), len(first) + h * w
    place = cell[:, start:stop] - start
    step = following[:, stop] - following[:, start]
    places = Places(
        lambda t, y, x: place[:, y * w + x] + t * step[:, None], int(cell[0, stop]) - start
    )
    if not two.positions(Layout.from_grid(two.grid).coords, places).equal(following):
        raise UnsupportedModel(
            f"{type(model).__name__}: positions of the text after a clip depend on its length. "
            "Give a folder of frames."
        )
    return places


def _asked(model: Any, processor: Any, prompt: ClipPrompt, fps: float) -> Tensor:
    """``(3, S)`` rotary positions of the whole prompt, by the model itself."""
    video = processor.video_processor
    t, h, w = prompt.grid
    ids = prompt.ids(Layout.from_grid(prompt.grid).coords)[None]
    arguments = {
        "input_ids": ids,
        "mm_token_type_ids": 2 * (ids == prompt.placeholder).int(),
        "video_grid_thw": torch.tensor([[t, h * video.merge_size, w * video.merge_size]]),
        "second_per_grid_ts": torch.tensor([video.temporal_patch_size / fps]),
        "attention_mask": torch.ones_like(ids),
    }
    known = inspect.signature(model.model.get_rope_index).parameters
    positions: Tensor = model.model.get_rope_index(
        **{name: value for name, value in arguments.items() if name in known}
    )[0]
    return positions[:, 0]
