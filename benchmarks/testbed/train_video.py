"""Train the testbed's model for clips: ``python benchmarks/testbed/train_video.py --out DIR``.

It starts from model ``b``, whose vision tower and projector stay as they are, so that clips are
encoded once (`clip_data.py --out DIR/pool` does that, before or meanwhile). The language model is
trained. Writes ``log.jsonl`` and ``checkpoint.pt`` to DIR.
"""

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from architecture import WIDTH, register_training_attention
from clip_data import (
    CLIP_TOKENS,
    FRAME_TOKENS,
    KINDS,
    MOTIONS,
    SEED,
    Chunk,
    ClipBatch,
    encode_chunk,
    load_chunk,
    make_batch,
    new_model,
)
from data import IGNORED
from recipes import VIDEO_RECIPE, ClipStage
from torch import Tensor, nn
from train import schedule

from tokenreduce_integrations.testbed import packed
from tokenreduce_integrations.testbed.clips import CLIP_QUESTION_TYPES, FRAMES, ClipGenerator

SEEING_LAYERS = 3
"""Layers of the language model before the states that tell what each token's object does."""
NAMING_LAYERS = 4
"""Layers before the states that tell what the object does that a word names."""
VALIDATION_SEED = 999
VALIDATION_CLIPS = 300
VALIDATION_BATCH = 50


class ClipHeads(nn.Module):
    """Training heads on hidden states of the language model; not part of the exported model."""

    def __init__(self) -> None:
        super().__init__()
        self.kinds = nn.Linear(WIDTH, KINDS)
        self.motions = nn.Linear(WIDTH, MOTIONS)
        self.word_motions = nn.Linear(WIDTH, MOTIONS)
        self.word_centres = nn.Linear(WIDTH, 4)
        self.times = nn.Linear(WIDTH, 1)

    def losses(
        self, tokens: Tensor, words: Tensor, batch: ClipBatch, chosen: Tensor
    ) -> dict[str, Tensor]:
        """Losses from the states of the visual tokens at `chosen` and of the question words."""
        motions, kinds = batch.motions.gather(1, chosen), batch.kinds.gather(1, chosen)
        weight = torch.ones(MOTIONS)
        weight[0] = 0.2
        found = {
            "motions": F.cross_entropy(
                self.motions(tokens).float().flatten(0, 1),
                motions.flatten(),
                weight=weight,
                ignore_index=IGNORED,
            )
        }
        shown = kinds > 0
        found["kinds"] = F.cross_entropy(self.kinds(tokens[shown]).float(), kinds[shown])
        moving = motions >= 2
        found["times"] = F.smooth_l1_loss(
            self.times(tokens[moving]).float().squeeze(-1),
            (chosen[moving] // FRAME_TOKENS) / (FRAMES - 1),
            beta=0.1,
        )
        named = batch.word_motions != IGNORED
        states = words[named]
        found["word_motions"] = F.cross_entropy(
            self.word_motions(states).float(), batch.word_motions[named]
        )
        found["word_centres"] = F.smooth_l1_loss(
            self.word_centres(states).float(), batch.word_centres[named], beta=0.1
        )
        return found


class ClipTrainer:
    """A model in training, and how far its recipe has come."""

    def __init__(
        self, recipe: tuple[ClipStage, ...], out: Path, pool: Path, compiled: bool
    ) -> None:
        self.recipe, self.out, self.pool = recipe, out, pool
        self.model = new_model()
        self.model.set_attn_implementation(register_training_attention())
        self.model.model.vision_tower.requires_grad_(False)
        self.model.model.multi_modal_projector.requires_grad_(False)
        self.heads = ClipHeads()
        self.parameters = [
            p for module in (self.model, self.heads) for p in module.parameters() if p.requires_grad
        ]
        self.read = torch.compile(self._read, dynamic=False) if compiled else self._read
        self.validation: Chunk | None = None
        self.stage = self.step = self.clips = 0
        self.cpu_seconds, self._clock = 0.0, time.process_time()

    def _read(
        self, features: Tensor, positions: Tensor, input_ids: Tensor, mask: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden states of the visual tokens, of the words, and last ones of the words."""
        newline = self.model.model.image_newline.expand(len(features), 1, -1)
        end = torch.full((len(features), 1), CLIP_TOKENS)
        inputs = packed.packed_inputs(
            self.model,
            torch.cat([features, newline], 1),
            torch.cat([positions, end], 1) + 1,
            input_ids,
            mask,
            unreduced=CLIP_TOKENS + 1,
        )
        output = self.model.model.language_model(
            **inputs, use_cache=False, output_hidden_states=True
        )
        count = features.shape[1]
        states = output.hidden_states
        words, last = (
            state[:, count + 2 :].unflatten(1, input_ids.shape[1:])
            for state in (states[NAMING_LAYERS], output.last_hidden_state)
        )
        return states[SEEING_LAYERS][:, 1 : count + 1], words, last

    def start_stage(self) -> None:
        """Create the optimiser of the current stage."""
        self.optimizer = torch.optim.AdamW(
            [
                {"params": [p for p in self.parameters if p.dim() >= 2], "weight_decay": 0.05},
                {"params": [p for p in self.parameters if p.dim() < 2], "weight_decay": 0.0},
            ],
            betas=(0.9, 0.98),
            fused=True,
        )
        self.rng = np.random.default_rng((SEED, self.stage))

    def batches(self, stage: ClipStage) -> Iterator[ClipBatch]:
        """Batches of a stage; every pass asks other questions."""
        for visit in range(stage.passes):
            for index in range(*stage.chunks):
                chunk = load_chunk(self.pool, index)
                order = self.rng.permutation(len(chunk.clips))
                for start in range(0, len(order), stage.batch_size):
                    rows = order[start : start + stage.batch_size]
                    yield make_batch(chunk, rows, 10 * self.stage + visit, stage.types)

    def train_step(self, batch: ClipBatch) -> dict[str, float]:
        """Make one optimiser step and return the losses."""
        stage = self.recipe[self.stage]
        for group in self.optimizer.param_groups:
            group["lr"] = stage.learning_rate * schedule(self.step, stage)
        count = stage.tokens[int(self.rng.integers(len(stage.tokens)))]
        chosen = visible_tokens(batch, count, int(self.rng.integers(2**31)))
        features = batch.features.gather(1, chosen[..., None].expand(-1, -1, WIDTH))
        mask = packed_mask(count, batch)
        with torch.autocast("cpu", torch.bfloat16):
            tokens, words, last = self.read(features, chosen, batch.input_ids, mask)
            losses = self.heads.losses(tokens, words, batch, chosen)
            answered = batch.targets != IGNORED
            logits = self.model.lm_head(last[answered]).float()
            losses["answers"] = F.cross_entropy(logits, batch.targets[answered])
            weighted = [weight * losses[name] for name, weight in stage.losses.items()]
        self.optimizer.zero_grad(set_to_none=True)
        torch.stack(weighted).sum().backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        return {name: loss.item() for name, loss in losses.items()}

    def run(self, log_every: int, check_every: int) -> None:
        """Train to the end of the recipe."""
        while self.stage < len(self.recipe):
            stage, self.step = self.recipe[self.stage], 0
            self.start_stage()
            averages: dict[str, float] = {}
            for batch in self.batches(stage):
                for name, value in self.train_step(batch).items():
                    averages[name] = 0.95 * averages.get(name, value) + 0.05 * value
                self.step += 1
                self.clips += len(batch.features)
                last = self.step == stage.steps
                if self.step % log_every == 0 or last:
                    self.log({"losses": {k: round(v, 4) for k, v in averages.items()}})
                if self.step % check_every == 0 or last:
                    self.log(self.check())
                    self.save()
            self.stage += 1

    def resume(self, name: str) -> None:
        """Start a stage from the checkpoint that the one before it left."""
        state = torch.load(self.out / "checkpoint.pt")
        self.model.load_state_dict(state["model"])
        self.heads.load_state_dict(state["heads"], strict=False)
        self.stage = [stage.name for stage in self.recipe].index(name)
        (self.clips, self.cpu_seconds) = state["progress"]

    @torch.no_grad()
    def check(self) -> dict[str, Any]:
        """Accuracy of the current model on held-out clips, unreduced."""
        if self.validation is None:
            self.validation = encode_chunk(self.model, ClipGenerator(VALIDATION_SEED, "test"), 0)
        types = dict.fromkeys(CLIP_QUESTION_TYPES, 1.0)
        right: dict[str, list[bool]] = defaultdict(list)
        moving: dict[str, list[bool]] = defaultdict(list)
        for rows in np.arange(VALIDATION_CLIPS).reshape(-1, VALIDATION_BATCH):
            batch = make_batch(self.validation, rows, 0, types)
            chosen = torch.arange(CLIP_TOKENS).expand(len(rows), -1)
            with torch.autocast("cpu", torch.bfloat16):
                tokens, words, last = self._read(
                    batch.features, chosen, batch.input_ids, packed_mask(CLIP_TOKENS, batch)
                )
                given = self.model.lm_head(last).argmax(-1) == batch.targets
                for what, states, true in (
                    ("tokens", self.heads.motions(tokens), batch.motions),
                    ("words", self.heads.word_motions(words), batch.word_motions),
                ):
                    moving[what] += (states.argmax(-1) == true)[true >= 2].tolist()
            answers = (batch.targets != IGNORED).int().argmax(-1, keepdim=True)
            for asked, row in zip(batch.questions, given.gather(-1, answers), strict=True):
                for question, correct in zip(asked, row.flatten().tolist(), strict=False):
                    right[question.type].append(correct)
        accuracy = {name: round(float(np.mean(right[name])), 3) for name in CLIP_QUESTION_TYPES}
        return {
            "macro": round(float(np.mean(list(accuracy.values()))), 4),
            "accuracy": accuracy,
            "moving": {what: round(float(np.mean(values)), 3) for what, values in moving.items()},
        }

    def log(self, record: dict[str, Any]) -> None:
        """Append a record, with where the training stands, to the log."""
        now = time.process_time()
        self.cpu_seconds, self._clock = self.cpu_seconds + now - self._clock, now
        record = {
            "stage": self.recipe[self.stage].name,
            "step": self.step,
            "clips": self.clips,
            "cpu_seconds": round(self.cpu_seconds, 1),
            **record,
        }
        line = json.dumps(record)
        print(line, flush=True)
        with (self.out / "log.jsonl").open("a") as file:
            file.write(line + "\n")

    def save(self) -> None:
        """Write the weights, and how far the training is."""
        partial = self.out / "checkpoint.partial"
        state = {
            "model": self.model.state_dict(),
            "heads": self.heads.state_dict(),
            "progress": (self.clips, self.cpu_seconds),
        }
        torch.save(state, partial)
        partial.replace(self.out / "checkpoint.pt")


def packed_mask(count: int, batch: ClipBatch) -> Tensor:
    """Additive mask of clips with `count` visual tokens and the newline, ``(1, 1, T, T)``."""
    visible = packed.packed_mask(count + 1, *batch.input_ids.shape[1:])
    return torch.zeros(1, 1, *visible.shape).masked_fill(~visible, -1e4)


def visible_tokens(batch: ClipBatch, count: int, seed: int) -> Tensor:
    """Draw which visual tokens the language model sees, in order, int64 ``(B, count)``.

    Tokens that tell all stay; tokens of objects are preferred to background at a rate of their own
    in each clip, so that an answer rests on what the tokens say and not on how many say it.
    """
    generator = torch.Generator().manual_seed(seed)
    clips, tokens = batch.kinds.shape
    favour = torch.rand(clips, 1, generator=generator)
    priority = torch.rand(clips, tokens, generator=generator)
    priority = priority + favour * (batch.kinds > 0) + 2 * batch.centres
    return priority.topk(count, 1).indices.sort(1).values


def main() -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--pool", type=Path, help="default: DIR/pool")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--resume",
        choices=[stage.name for stage in VIDEO_RECIPE],
        help="start this stage from DIR/checkpoint.pt",
    )
    parser.add_argument("--no-compile", action="store_true", help="do without torch.compile")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    trainer = ClipTrainer(
        VIDEO_RECIPE, options.out, options.pool or options.out / "pool", not options.no_compile
    )
    if options.resume:
        trainer.resume(options.resume)
    trainer.run(log_every=25, check_every=100)


if __name__ == "__main__":
    main()
