"""What transformers makes of a prompt whose visual tokens were reduced, step by step.

The whole model reads the whole prompt once, and what its LLM is called with is caught. Visual
columns are then replaced by what a reducer makes of them, and the LLM alone generates, without a
cache. Nothing of the integrations takes part.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from support.served_checkpoints import FAMILIES
from support.served_engines import TOKENS, Answer
from support.tiny_models import IMAGE, VIDEO
from tokenreduce.reducer import Reducer
from tokenreduce.reduction import Reduction
from tokenreduce.tokens import Layout, VisualTokens

#: ``(tokens,)`` -> where they lie.
LayoutOf = Callable[[int], Layout]


class Reference:
    """A checkpoint in transformers.

    Args:
        folder: of the checkpoint.
        name: of its family.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self.family = FAMILIES[name]
        self.model = transformers.AutoModelForImageTextToText.from_pretrained(
            folder, dtype=torch.float32
        ).eval()
        self.processor = transformers.AutoProcessor.from_pretrained(folder)
        self.mrope = hasattr(self.model.config.get_text_config(), "rope_parameters") and (
            "mrope_section" in (self.model.config.get_text_config().rope_parameters or {})
        )

    def inputs(self, asked: dict[str, Any]) -> Any:
        """What the processor makes of a request to an engine."""
        media = asked["multi_modal_data"]
        given: dict[str, Any] = {"text": [asked["prompt"]], "return_tensors": "pt"}
        if "image" in media:
            given["images"] = [media["image"]]
        if "video" in media:
            (frames, facts), *_ = media["video"]
            metadata = {key: facts[key] for key in facts if key != "do_sample_frames"}
            given |= {
                "videos": [frames],
                "video_metadata": [metadata],
                "do_sample_frames": False,
            }
        return self.processor(**given)

    @torch.no_grad()
    def answer(
        self, asked: dict[str, Any], reducer: Reducer, layout: LayoutOf, grids: Sequence[Any] = ()
    ) -> Answer:
        """What the LLM generates greedily behind the reduced prompt.

        Args:
            asked: a request to an engine, of one image or clip.
            reducer: the strategy.
            layout: of the item.
            grids: for models with M-RoPE: rows and columns of each frame of the item, and its time.
        """
        inputs = self.inputs(asked)
        seen = self._called_with(inputs)
        embeddings: Tensor = seen["inputs_embeds"]
        ids = inputs["input_ids"][0]
        columns = ((ids == IMAGE) | (ids == VIDEO)).nonzero()[:, 0]
        features = embeddings[:, columns]
        reduction = reducer(VisualTokens(features, layout(len(columns))))
        kept = _columns(len(ids), columns, reduction)
        whole = embeddings.clone()
        whole[:, columns[reduction.positions[0]]] = reduction.features
        positions, following = self._positions(ids, columns, grids, kept)
        return self._generate(whole[:, kept], positions, following)

    def _called_with(self, inputs: Any) -> dict[str, Any]:
        caught: dict[str, Any] = {}
        decoder = self.model.get_decoder()
        handle = decoder.register_forward_pre_hook(
            lambda module, args, kwargs: caught.update(kwargs), with_kwargs=True
        )
        self.model(**inputs)
        handle.remove()
        return caught

    def _positions(
        self, ids: Tensor, columns: Tensor, grids: Sequence[Any], kept: Tensor
    ) -> tuple[Tensor, int]:
        """Positions of the kept columns, and that of the next token."""
        if not self.mrope:
            # The engine counts the tokens of the prompt that it sees.
            return torch.arange(len(kept))[None], len(kept)
        parts, at, end = [], 0, 0
        for start, frames in _items(columns, grids):
            words = start - end
            parts.append(torch.arange(at, at + words).expand(3, -1))
            at += words
            cells = torch.cat(
                [
                    torch.stack(
                        torch.meshgrid(
                            torch.tensor([time]),
                            torch.arange(rows),
                            torch.arange(cells_a_row),
                            indexing="ij",
                        )
                    ).reshape(3, -1)
                    for time, rows, cells_a_row in frames
                ],
                dim=1,
            )
            parts.append(cells + at)
            at, end = at + int(cells.max()) + 1, start + cells.shape[1]
        words = len(ids) - end
        parts.append(torch.arange(at, at + words).expand(3, -1))
        return torch.cat(parts, dim=1)[:, None, kept], at + words

    def _generate(self, embeddings: Tensor, positions: Tensor, following: int) -> Answer:
        length, ids, logprobs = embeddings.shape[1], [], []
        decoder, head = self.model.get_decoder(), self.model.get_output_embeddings()
        for step in range(TOKENS):
            states = decoder(
                inputs_embeds=embeddings, position_ids=positions, use_cache=False
            ).last_hidden_state
            scores = head(states[0, -1]).float().log_softmax(-1)
            token = int(scores.argmax())
            ids.append(token)
            logprobs.append(float(scores[token]))
            fresh = self.model.get_input_embeddings()(torch.tensor([[token]]))
            embeddings = torch.cat([embeddings, fresh], dim=1)
            later = torch.full((*positions.shape[:-1], 1), following + step)
            positions = torch.cat([positions, later], dim=-1)
        return Answer(prompt_tokens=length, ids=tuple(ids), logprobs=tuple(logprobs))


def _items(columns: Tensor, grids: Sequence[Any]) -> list[tuple[int, Sequence[Any]]]:
    return [(int(columns[0]), grids)] if len(grids) else []


def _columns(length: int, columns: Tensor, reduction: Reduction) -> Tensor:
    """Columns of a prompt that stay."""
    stays = torch.ones(length, dtype=torch.bool)
    stays[columns] = False
    stays[columns[reduction.positions[0]]] = True
    return stays.nonzero()[:, 0]
