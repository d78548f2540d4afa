"""Reduction, quantization and a pruned encoder on the testbed: accuracy, bytes, FLOPs, time.

    python benchmarks/testbed/compose.py benchmarks/testbed/composition.yaml --out results.json

Reads one YAML file with a pipeline and variants of it, each a list of overrides. Every variant
answers the same questions about the same held-out scenes; differences to the first variant are
paired, with 95 % bootstraps over scenes. Costs are those of ``tokenreduce bench`` for one prompt,
in interleaved pairs with the unmodified model.
"""

import argparse
import json
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml

import tokenreduce as tr
from tokenreduce_integrations.accounting.bench import compare
from tokenreduce_integrations.testbed.evaluation import (
    Bootstrap,
    answer_questions,
    encode_scenes,
)
from tokenreduce_integrations.testbed.examples import example_image
from tokenreduce_integrations.testbed.models import card

BATCH_SIZES = (1, 16)
QUESTION = "what digit is shown ?"


def prompt(processor: Any, device: torch.device) -> Mapping[str, Any]:
    """One question about one scene."""
    content = [{"type": "image", "image": example_image()}, {"type": "text", "text": QUESTION}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    return dict(inputs.to(device))


def run(sweep: Mapping[str, Any], *, scenes: int, seed: int, rounds: int) -> dict[str, Any]:
    """Evaluate every variant of a sweep.

    Args:
        sweep: ``pipeline`` and ``variants``, as in the YAML file.
        scenes: number of held-out scenes.
        seed: of the scenes.
        rounds: interleaved pairs that are timed.

    Returns:
        one JSON document.
    """
    rows: list[dict[str, Any]] = []
    first = bootstrap = None
    for name, overrides in sweep["variants"].items():
        pipeline = tr.load_pipeline(sweep["pipeline"], overrides)
        cost = compare(pipeline, prompt, batch_sizes=BATCH_SIZES, rounds=rounds, new_tokens=4)
        model, processor, attachment = pipeline.build()
        attachment.detach()
        [stage] = pipeline.stages
        types = card(pipeline.model.path.removeprefix("testbed:"))["reported_types"]
        encoded = encode_scenes(model, processor, seed=seed, scenes=scenes, types=types)
        correct = answer_questions(model, encoded, stage.reducer)
        if first is None or bootstrap is None:
            first, bootstrap = correct, Bootstrap(encoded)
        macro, lost = bootstrap.macro(correct), bootstrap.difference(correct, first)
        mine = cost.pipeline
        rows.append(
            {
                "variant": name,
                "overrides": overrides,
                "accuracy": [macro.value, macro.low, macro.high],
                "difference": [lost.value, lost.low, lost.high],
                "visual_tokens": mine.layer_average,
                "parameters": mine.weights.total_parameters,
                "encoder_parameters": mine.weights.parameters["encoder"],
                "weight_bytes": mine.weights.total_bytes,
                "flops": {**mine.flops.parts, "total": mine.flops.total},
                "kv_bytes": mine.kv_bytes,
                "times_ms": {batch: times.as_dict() for batch, times in mine.times.items()},
                "speedup": cost.speedup,
                "warnings": cost.warnings,
            }
        )
        print(table(rows[-1:]), flush=True)
    return {
        "scenes": scenes,
        "scene_seed": seed,
        "rounds": rounds,
        "rows": rows,
        "device": f"{platform.machine()} CPU, {torch.get_num_threads()} thread(s)",
        "versions": {
            "tokenreduce": tr.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
    }


def table(rows: list[dict[str, Any]]) -> str:
    """The rows in Markdown."""
    lines = []
    for row in rows:
        macro, lost = ([100 * x for x in row[name]] for name in ("accuracy", "difference"))
        speeds = " | ".join(f"{speed:.2f}x" for speed in row["speedup"].values())
        lines.append(
            f"| {row['variant']} | {macro[0]:.1f} [{macro[1]:.1f}, {macro[2]:.1f}] | "
            f"{lost[0]:+.1f} [{lost[1]:+.1f}, {lost[2]:+.1f}] | {row['visual_tokens']:.0f} | "
            f"{row['parameters'] / 1e6:.2f} | {row['weight_bytes'] / 2**20:.2f} | "
            f"{row['flops']['total'] / 1e6:.0f} | {row['kv_bytes'] / 1024:.0f} | "
            f"{speeds} |"
        )
    return "\n".join(lines)


HEADINGS = (
    "| variant | accuracy | difference | visual tokens | parameters, M | weights, MiB | MFLOPs | "
    "KV, KiB | " + " | ".join(f"first token, batch {batch}" for batch in BATCH_SIZES) + " |\n"
    "|---|---|---|---:|---:|---:|---:|---:|" + "---:|" * len(BATCH_SIZES)
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("sweep", type=Path)
    parser.add_argument("--scenes", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=30101)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="write the result as JSON")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    sweep = yaml.safe_load(options.sweep.read_text(encoding="utf-8"))
    result = run(sweep, scenes=options.scenes, seed=options.seed, rounds=options.rounds)
    print(HEADINGS)
    print(table(result["rows"]))
    if options.out is not None:
        options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
