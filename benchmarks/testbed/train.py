"""Train a testbed model from scratch: ``python benchmarks/testbed/train.py --model a --out DIR``.

Writes ``log.jsonl`` and ``checkpoint.pt`` (weights, and all that is needed to resume) to DIR.
"""

import argparse
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from architecture import WIDTH, build_model, register_training_attention
from data import IGNORED, QUESTION_WIDTH, QUESTIONS, Batch, make_batch
from evaluate import evaluate, macro
from losses import AuxiliaryHeads, normalise
from recipes import RECIPES, Stage
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration

from tokenreduce_integrations.testbed import packed
from tokenreduce_integrations.testbed.scenes import SceneGenerator

GROUNDED_LAYERS = 2
"""Layers of the language model before the state that the grounding loss reads."""
VALIDATION_SEED = 999
VALIDATION_IMAGES = 200
SEEDS = {"a": 1, "b": 2}


class Trainer:
    """A model in training, and how far its recipe has come."""

    def __init__(self, recipe: tuple[Stage, ...], seed: int, out: Path, compiled: bool) -> None:
        torch.manual_seed(seed)
        self.recipe, self.out = recipe, out
        self.model: LlavaForConditionalGeneration = build_model()
        self.model.set_attn_implementation(register_training_attention())
        self.heads = AuxiliaryHeads(WIDTH)
        self.generator = SceneGenerator(seed, "train")
        self.stage = self.step = self.scenes = 0
        self.cpu_seconds = 0.0
        self._clock = time.process_time()
        visible = packed.packed_mask(packed.IMAGE_TOKENS, QUESTIONS, QUESTION_WIDTH)
        self.mask = torch.zeros(1, 1, *visible.shape).masked_fill(~visible, -1e4)
        self.see: Callable[..., tuple[Tensor, Tensor]] = self._see
        self.read: Callable[..., tuple[Tensor, Tensor]] = self._read
        if compiled:
            self.see, self.read = torch.compile(self._see), torch.compile(self._read)
        self.start_stage()

    def _see(self, images: Tensor) -> tuple[Tensor, Tensor]:
        output = self.model.model.vision_tower(normalise(images), output_hidden_states=True)
        return output.hidden_states[-2][:, 1:], output.pooler_output

    def _read(self, patches: Tensor, input_ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        features = self.model.model.multi_modal_projector(patches)
        positions = packed.image_positions(len(patches))
        inputs = packed.packed_inputs(self.model, features, positions, input_ids, mask)
        output = self.model.model.language_model(
            **inputs, use_cache=False, output_hidden_states=True
        )
        states = (output.hidden_states[GROUNDED_LAYERS], output.last_hidden_state)
        grounded, last = (
            state[:, 1 + packed.IMAGE_TOKENS :].unflatten(1, input_ids.shape[1:])
            for state in states
        )
        return grounded, last

    def start_stage(self) -> None:
        """Create the optimiser of the current stage."""
        trained: list[nn.Module] = [self.heads]
        answers = "answers" in self.recipe[self.stage].losses
        trained.append(self.model if answers else self.model.model.vision_tower)
        parameters = [p for module in trained for p in module.parameters()]
        self.parameters = parameters
        self.optimizer = torch.optim.AdamW(
            [
                {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": 0.05},
                {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
            ],
            betas=(0.9, 0.98),
            fused=True,
        )

    def train_step(self, batch: Batch) -> dict[str, float]:
        """Make one optimiser step and return the losses."""
        stage = self.recipe[self.stage]
        rate = stage.learning_rate * schedule(self.step, stage)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        with torch.autocast("cpu", torch.bfloat16):
            patches, pooled = self.see(batch.images)
            losses = self.heads.losses(patches, pooled, batch, set(stage.losses))
            if "answers" in stage.losses:
                mask = self.mask
                if stage.varied_density:
                    mask = mask + hidden_columns(visible_tokens(batch, self.scenes), mask.shape[-1])
                grounded, hidden = self.read(patches, batch.input_ids, mask)
                if "grounding" in stage.losses:
                    losses["grounding"] = self.heads.grounding_loss(grounded, batch)
                answered = batch.targets != IGNORED
                logits = self.model.lm_head(hidden[answered]).float()
                losses["answers"] = F.cross_entropy(logits, batch.targets[answered])
            total = torch.stack([stage.losses[name] * loss for name, loss in losses.items()]).sum()
        self.optimizer.zero_grad(set_to_none=True)
        total.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        return {name: loss.item() for name, loss in losses.items()}

    def run(self, log_every: int, check_every: int) -> None:
        """Train to the end of the recipe."""
        averages: dict[str, float] = {}
        while self.stage < len(self.recipe):
            stage = self.recipe[self.stage]
            while self.step < stage.steps:
                batch = make_batch(self.generator, self.scenes, stage.batch_size, stage.types)
                for name, value in self.train_step(batch).items():
                    averages[name] = 0.95 * averages.get(name, value) + 0.05 * value
                self.step += 1
                self.scenes += stage.batch_size
                last = self.step == stage.steps
                if self.step % log_every == 0 or last:
                    self.log({"losses": {k: round(v, 4) for k, v in averages.items()}})
                if self.step % check_every == 0 or last:
                    self.log(self.check())
                    self.save()
            self.stage, self.step = self.stage + 1, 0
            if self.stage < len(self.recipe):
                averages = {}
                self.start_stage()

    @torch.no_grad()
    def check(self) -> dict[str, Any]:
        """Measure the current model on held-out scenes."""
        stage = self.recipe[self.stage]
        with torch.autocast("cpu", torch.bfloat16):
            if "answers" in stage.losses:
                results = evaluate(self.model, VALIDATION_SEED, VALIDATION_IMAGES)
                by_type = {name: round(result.accuracy, 3) for name, result in results.items()}
                return {"macro": round(macro(results), 4), "accuracy": by_type}
            generator = SceneGenerator(VALIDATION_SEED, "test")
            batch = make_batch(generator, 0, VALIDATION_IMAGES, {"background": 1.0})
            patches, pooled = self._see(batch.images)
            return {"vision": self.heads.accuracies(patches, pooled, batch, set(stage.losses))}

    def log(self, record: dict[str, Any]) -> None:
        """Append a record, with where the training stands, to the log."""
        now = time.process_time()
        self.cpu_seconds, self._clock = self.cpu_seconds + now - self._clock, now
        record = {
            "stage": self.recipe[self.stage].name,
            "step": self.step,
            "scenes": self.scenes,
            "cpu_seconds": round(self.cpu_seconds, 1),
            **record,
        }
        line = json.dumps(record)
        print(line, flush=True)
        with (self.out / "log.jsonl").open("a") as file:
            file.write(line + "\n")

    def save(self) -> None:
        """Write a checkpoint that `resume` continues from."""
        state = {
            "model": self.model.state_dict(),
            "heads": self.heads.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "progress": (self.stage, self.step, self.scenes, self.cpu_seconds),
        }
        partial = self.out / "checkpoint.partial"
        torch.save(state, partial)
        partial.replace(self.out / "checkpoint.pt")

    def resume(self) -> None:
        """Continue from the last checkpoint."""
        state = torch.load(self.out / "checkpoint.pt")
        self.model.load_state_dict(state["model"])
        self.heads.load_state_dict(state["heads"], strict=False)
        self.stage, self.step, self.scenes, self.cpu_seconds = state["progress"]
        if self.step >= self.recipe[self.stage].steps:
            self.stage, self.step = self.stage + 1, 0
        self.start_stage()
        if self.step:
            self.optimizer.load_state_dict(state["optimizer"])
        log = self.out / "log.jsonl"
        lines = [x for x in log.open() if json.loads(x)["scenes"] <= self.scenes]
        log.write_text("".join(lines))


def visible_tokens(batch: Batch, seed: int) -> Tensor:
    """Draw which visual tokens the language model sees, bool ``(B, 144)``.

    Patches of objects and patches of the background stay at two independent random rates, so that
    an answer rests on what the tokens say and not on how many say it, as in models trained on
    pictures of many resolutions. The centre of every object stays.
    """
    generator = torch.Generator().manual_seed(seed)
    rates = torch.rand(2, len(batch.images), 1, generator=generator)
    background = (1.2 * rates[0]).clamp(0.03, 1.0)
    objects = (0.15 + rates[1]).clamp(max=1.0)
    rate = torch.where(batch.patch_labels > 0, objects, background)
    return (torch.rand(rate.shape, generator=generator) < rate) | batch.centre_patches


def hidden_columns(visible: Tensor, length: int) -> Tensor:
    """Additive mask ``(B, 1, 1, length)`` over the keys: the start token, then the visual ones."""
    mask = torch.zeros(len(visible), 1, 1, length)
    mask[:, 0, 0, 1 : 1 + visible.shape[1]].masked_fill_(~visible, -1e4)
    return mask


def schedule(step: int, stage: Stage) -> float:
    """Factor of the learning rate: warm-up, plateau, then a cosine to 2 %."""
    warm = min(1.0, (step + 1) / 100)
    progress = step / (stage.horizon or stage.steps)
    decay = max(0.0, (progress - stage.plateau) / (1 - stage.plateau))
    return warm * (0.02 + 0.98 * (1 + math.cos(math.pi * decay)) / 2)


def main() -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=sorted(RECIPES), required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, help="default: the seed of the exported model")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--resume", action="store_true", help="continue from DIR/checkpoint.pt")
    parser.add_argument("--no-compile", action="store_true", help="do without torch.compile")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    seed = SEEDS[options.model] if options.seed is None else options.seed
    trainer = Trainer(RECIPES[options.model], seed, options.out, not options.no_compile)
    if options.resume:
        trainer.resume()
    trainer.run(log_every=100, check_every=500)


if __name__ == "__main__":
    main()
