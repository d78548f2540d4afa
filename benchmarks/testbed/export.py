"""Write trained weights as a Hugging Face folder with tokenizer, processor and card.

``python benchmarks/testbed/export.py --model a --run DIR``
"""

import argparse
import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from architecture import build_model, build_video_model
from clip_data import SEED as CLIP_SEED
from evaluate import TypeResult, evaluate, evaluate_clips, macro
from recipes import RECIPES, VIDEO_RECIPE, ClipStage, Stage
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from train import SEEDS, VALIDATION_SEED
from transformers import (
    CLIPImageProcessor,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from tokenreduce_integrations.testbed.models import MODEL_NAMES, VIDEO_MODEL_NAMES, model_path
from tokenreduce_integrations.testbed.scenes import (
    GRID_SIZE,
    IMAGE_SIZE,
    PATCH_SIZE,
)
from tokenreduce_integrations.testbed.vocabulary import (
    BOS,
    EOS,
    IMAGE,
    PAD,
    SCENE_WORDS,
    TOKEN_IDS,
    UNKNOWN,
    VIDEO,
    WORDS,
)

CARD_SEED = 40_961
"""Seed of the scenes of the card, which no choice in training was based on."""
REPORTED_MARGIN = 0.15
"""A type is reported if its accuracy exceeds the majority baseline by this much."""

CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'user' %}"
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}<image> {% endif %}{% endfor %}USER: "
    "{% for c in m['content'] %}{% if c['type'] == 'text' %}{{ c['text'] }} {% endif %}{% endfor %}"
    "{% else %}ASSISTANT: {{ m['content'][0]['text'] }} </s> {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
VIDEO_CHAT_TEMPLATE = CHAT_TEMPLATE.replace(
    "{% endif %}{% endfor %}USER:",
    "{% elif c['type'] == 'video' %}<video> {% endif %}{% endfor %}USER:",
)

PIXELS: dict[str, Any] = {
    "size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE},
    "image_mean": [0.5] * 3,
    "image_std": [0.25] * 3,
}


def build_tokenizer(vocabulary: tuple[str, ...], **special: str) -> PreTrainedTokenizerFast:
    """Build a tokenizer with one token a word."""
    ids = {word: index for index, word in enumerate(vocabulary)}
    words = Tokenizer(models.WordLevel(ids, unk_token=UNKNOWN))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, TOKEN_IDS[BOS])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNKNOWN,
        pad_token=PAD,
        extra_special_tokens={"image_token": IMAGE, **special},
        padding_side="left",
    )


def build_processor() -> LlavaProcessor:
    """Build the processor of pictures, which keep their size."""
    return LlavaProcessor(
        image_processor=CLIPImageProcessor(do_center_crop=False, **PIXELS),
        tokenizer=build_tokenizer(SCENE_WORDS),
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        image_token=IMAGE,
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def build_video_processor() -> LlavaOnevisionProcessor:
    """Build the processor of clips, whose frames keep their size; all frames are taken."""
    return LlavaOnevisionProcessor(
        image_processor=LlavaOnevisionImageProcessor(
            image_grid_pinpoints=[[IMAGE_SIZE, IMAGE_SIZE]], **PIXELS
        ),
        video_processor=LlavaOnevisionVideoProcessor(**PIXELS),
        tokenizer=build_tokenizer(WORDS, video_token=VIDEO),
        num_image_tokens=GRID_SIZE**2,
        vision_feature_select_strategy="default",
        chat_template=VIDEO_CHAT_TEMPLATE,
    )


def export_model(name: str, weights: dict[str, torch.Tensor], folder: Path) -> Any:
    """Save weights in bfloat16 with everything `from_pretrained` needs; return what it loads."""
    sees_clips = name in VIDEO_MODEL_NAMES
    model = build_video_model() if sees_clips else build_model()
    model.load_state_dict(weights)
    generation = model.generation_config
    generation.bos_token_id = TOKEN_IDS[BOS]
    generation.eos_token_id = TOKEN_IDS[EOS]
    generation.pad_token_id = TOKEN_IDS[PAD]
    generation.do_sample = False
    generation.max_new_tokens = 4
    shutil.rmtree(folder, ignore_errors=True)
    model.to(torch.bfloat16).save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)
    processor = build_video_processor() if sees_clips else build_processor()
    processor.save_pretrained(folder)
    return type(model).from_pretrained(folder, dtype=torch.float32).eval()


def make_card(
    name: str, results: dict[str, TypeResult], log: list[dict[str, Any]], images: int
) -> dict[str, Any]:
    """Describe how a model was trained and what it can do."""
    reported = [
        kind
        for kind, result in results.items()
        if result.accuracy >= result.majority + REPORTED_MARGIN
    ]
    if name in VIDEO_MODEL_NAMES:
        training = {
            "command": "python benchmarks/testbed/train_video.py --out DIR",
            "starts_from": "b",
            "seed": CLIP_SEED,
        }
        stages: Sequence[Stage | ClipStage] = VIDEO_RECIPE
        seen = "clips"
    else:
        training = {
            "command": f"python benchmarks/testbed/train.py --model {name} --out DIR",
            "seed": SEEDS[name],
        }
        stages, seen = RECIPES[name], "scenes"
    return {
        "model": name,
        **training,
        "stages": [{**asdict(stage), "types": dict(stage.types)} for stage in stages],
        "finished": log[-1]["stage"] == stages[-1].name and log[-1]["step"] == stages[-1].steps,
        "steps": _steps(log),
        seen: log[-1][seen],
        "cpu_seconds": log[-1]["cpu_seconds"],
        "validation_seed": VALIDATION_SEED,
        "evaluation": {
            "seed": CARD_SEED,
            "split": "test",
            "clips" if seen == "clips" else "images": images,
            "questions": sum(result.questions for result in results.values()),
            "dtype": "float32",
            "by_type": {
                kind: {key: round(value, 4) for key, value in asdict(result).items()}
                for kind, result in results.items()
            },
            "macro": round(macro(results, tuple(results)), 4),
            "macro_reported": round(macro(results, reported), 4),
        },
        "reported_types": reported,
        "unreported_types": [kind for kind in results if kind not in reported],
    }


def _steps(log: list[dict[str, Any]]) -> int:
    """Optimiser steps over all stages."""
    by_stage = {record["stage"]: record["step"] for record in log}
    return sum(by_stage.values())


def main() -> None:
    """Parse the command line and export."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=(*MODEL_NAMES, *VIDEO_MODEL_NAMES), required=True)
    parser.add_argument("--run", type=Path, required=True, help="output folder of the training")
    parser.add_argument("--out", type=Path, help="default: the folder inside the package")
    parser.add_argument(
        "--images", type=int, default=1000, help="held-out images or clips for the card"
    )
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    folder = options.out or model_path(options.model)
    checkpoint = torch.load(options.run / "checkpoint.pt")
    records = (options.run / "log.jsonl").read_text().splitlines()
    log = [json.loads(record) for record in records]
    partial = folder.with_suffix(".partial")
    model = export_model(options.model, checkpoint["model"], partial)
    if options.model in VIDEO_MODEL_NAMES:
        results = evaluate_clips(model, build_video_processor(), CARD_SEED, options.images)
    else:
        results = evaluate(model, CARD_SEED, options.images)
    card = make_card(options.model, results, log, options.images)
    (partial / "card.json").write_text(json.dumps(card, indent=2) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    kept_log = Path(__file__).parent / "logs" / f"{options.model}.jsonl"
    shutil.copyfile(options.run / "log.jsonl", kept_log)
    print(json.dumps(card["evaluation"], indent=2))


if __name__ == "__main__":
    main()
