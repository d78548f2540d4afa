"""What transformers makes of a prompt whose visual tokens were reduced, step by step.

The whole model reads the whole prompt once, and what its LLM is called with is caught. Visual
columns are then replaced by what a reducer makes of them, and the LLM alone generates, without a
cache. Nothing of the integrations takes part.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

import tokenreduce as tr
from support.served_engines import TOKENS, Answer
from support.tiny_models import IMAGE, VIDEO
from tokenreduce.reducer import Reducer
from tokenreduce.tokens import Layout, VisualTokens


def _mosaic(rows: int, columns: int) -> Layout:
    """A thumbnail of six by six, and a mosaic of tiles with a newline at the end of each row."""
    tiles = Layout.from_grid((rows, columns + 1), block=1).coords
    coords = torch.cat([Layout.from_grid((6, 6)).coords, tiles])
    return Layout(coords, (coords[:, 0] == 1) & (coords[:, 3] == columns))


def _clip(frames: int, side: int) -> Layout:
    """A clip with a newline behind it."""
    cells = Layout.from_grid((frames, side, side)).coords
    newline = torch.tensor([[0, frames - 1, side - 1, side]])
    return Layout(torch.cat([cells, newline]), torch.arange(len(cells) + 1) == len(cells))


#: By family and number of tokens.
LAYOUTS = {
    ("llava", 144): Layout.from_grid((12, 12)),
    ("llava-next", 88): _mosaic(4, 12),
    ("llava-next", 192): _mosaic(12, 12),
    ("onevision", 88): _mosaic(4, 12),
    ("onevision", 192): _mosaic(12, 12),
    ("onevision", 73): _clip(8, 3),
}


class Reference:
    """A checkpoint in transformers.

    Args:
        folder: of the checkpoint.
        name: of its family.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self.name = name
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
    def answer(self, asked: dict[str, Any], reducer: Reducer) -> Answer:
        """What the LLM generates greedily behind the reduced prompt.

        Args:
            asked: a request to an engine, of one image or clip.
            reducer: the strategy.
        """
        inputs = self.inputs(asked)
        seen = self._called_with(inputs)
        ids = inputs["input_ids"][0]
        columns = ((ids == IMAGE) | (ids == VIDEO)).nonzero()[:, 0]
        layouts = self.layouts(inputs, len(columns))
        stays = torch.ones(len(ids), dtype=torch.bool)
        stays[columns] = False
        carried = [seen["inputs_embeds"][0], *self._deepstack(seen, columns)]
        for mine, layout in zip(columns.split([len(e) for e in layouts]), layouts, strict=True):
            reduction = reducer(VisualTokens(carried[0][None, mine], layout))
            places = mine[reduction.positions[0]]
            stays[places] = True
            for whole in carried:
                whole[places] = reduction.apply(whole[None, mine])[0]
        positions, following = self._positions(inputs, seen, stays)
        visual = torch.zeros(len(ids), dtype=torch.bool)
        visual[columns] = True
        deep = [whole[visual & stays] for whole in carried[1:]]
        return self._generate(carried[0][None, stays], positions, following, visual[stays], deep)

    @torch.no_grad()
    def attached_answer(self, asked: dict[str, Any], reducer: Reducer) -> Answer:
        """The same, with what TokenReduce makes of the prompt in transformers, signals included.

        Positions are those that an engine counts.
        """
        inputs = self.inputs(asked)
        with tr.attach(self.model, reducer, processor=self.processor):
            seen = self._called_with(inputs)
        embeddings = seen["inputs_embeds"]
        length = embeddings.shape[1]
        positions = seen["position_ids"][-3:] if self.mrope else torch.arange(length)[None]
        if self._is_paced(inputs):
            ids = inputs["input_ids"][0]
            behind = len(ids) - int((ids == VIDEO).nonzero()[-1]) - 1
            positions = positions.clone()
            positions[..., -behind:] = self._paced_positions(inputs)[..., -behind:]
        following = int(positions[..., -1].max()) + 1
        deep = seen.get("deepstack_visual_embeds")
        visual = seen["visual_pos_masks"][0] if deep else torch.zeros(length, dtype=torch.bool)
        return self._generate(embeddings, positions, following, visual, deep)

    def layouts(self, inputs: Any, tokens: int) -> list[Layout]:
        """Where the tokens of each part of an item lie that is reduced by itself."""
        if self.name == "internvl":
            tiles = inputs["pixel_values"].shape[0]
            frame = Layout.from_grid((4, 4))
            if "Frame1" in self.processor.tokenizer.decode(inputs["input_ids"][0]):
                return [frame] * tiles
            coords = [Layout.from_grid((4, 4), block=block).coords for block in range(tiles)]
            return [Layout(torch.cat(coords))]
        if self.mrope:
            kind = "image" if "image_grid_thw" in inputs else "video"
            frames, rows, columns = inputs[f"{kind}_grid_thw"][0].tolist()
            return [Layout.from_grid((frames, rows // 2, columns // 2))]
        return [LAYOUTS[self.name, tokens]]

    def _deepstack(self, seen: dict[str, Any], columns: Tensor) -> list[Tensor]:
        """``(S, D)`` what of visual tokens enters later layers, at their columns."""
        length = seen["inputs_embeds"].shape[1]
        spread = []
        for layer in seen.get("deepstack_visual_embeds") or ():
            spread.append(layer.new_zeros(length, layer.shape[-1]))
            spread[-1][columns] = layer
        return spread

    def _called_with(self, inputs: Any) -> dict[str, Any]:
        caught: dict[str, Any] = {}
        decoder = self.model.get_decoder()
        handle = decoder.register_forward_pre_hook(
            lambda module, args, kwargs: caught.update(kwargs), with_kwargs=True
        )
        self.model(**inputs)
        handle.remove()
        return caught

    def _positions(self, inputs: Any, seen: dict[str, Any], stays: Tensor) -> tuple[Tensor, int]:
        """Positions of the columns that stay, and that of the next token."""
        if not self.mrope:
            # The engine counts the tokens of the prompt that it sees.
            left = int(stays.sum())
            return torch.arange(left)[None], left
        positions = seen["position_ids"][-3:]
        if self._is_paced(inputs):
            positions = self._paced_positions(inputs)
        return positions[..., stays], int(positions[..., -1].max()) + 1

    def _is_paced(self, inputs: Any) -> bool:
        """Whether transformers goes on with text elsewhere than vLLM: behind clips of Qwen2.5-VL,
        not reduced either."""
        return self.name == "qwen2.5-vl" and "video_grid_thw" in inputs

    def _paced_positions(self, inputs: Any) -> Tensor:
        """``(3, 1, S)`` positions by the rule of Qwen2.5-VL: frames at the pace of their time, text
        behind them from the greatest on."""
        (frames, rows, columns), *_ = inputs["video_grid_thw"].tolist()
        seconds = float(torch.as_tensor(inputs["second_per_grid_ts"])[0])
        pace = seconds * self.model.config.vision_config.tokens_per_second
        axes = (
            (torch.arange(frames) * pace).long(),
            torch.arange(rows // 2),
            torch.arange(columns // 2),
        )
        cells = torch.stack(torch.meshgrid(*axes, indexing="ij")).reshape(3, -1)
        ids = inputs["input_ids"][0]
        start = int((ids == VIDEO).nonzero()[0])
        behind = len(ids) - start - cells.shape[1]
        before, after = torch.arange(start), torch.arange(behind) + start + int(cells.max()) + 1
        parts = [before.expand(3, -1), cells + start, after.expand(3, -1)]
        return torch.cat(parts, dim=1)[:, None]

    def _generate(
        self, embeddings: Tensor, positions: Tensor, following: int, visual: Tensor, deep: Any
    ) -> Answer:
        length, ids, logprobs = embeddings.shape[1], [], []
        decoder, head = self.model.get_decoder(), self.model.get_output_embeddings()
        for step in range(TOKENS):
            extra = {}
            if deep:
                mask = torch.nn.functional.pad(visual, (0, step))[None]
                extra = {"visual_pos_masks": mask, "deepstack_visual_embeds": deep}
            states = decoder(
                inputs_embeds=embeddings, position_ids=positions, use_cache=False, **extra
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
