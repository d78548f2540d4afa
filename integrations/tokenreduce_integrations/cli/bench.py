"""``tokenreduce bench``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tokenreduce_integrations.cli.output import Json, console, print_json, table
from tokenreduce_integrations.cli.run import Overrides

if TYPE_CHECKING:
    import torch

    from tokenreduce_integrations.accounting.bench import Comparison, Side

_QUESTION = "what is in the picture ?"


def bench(
    pipeline: Annotated[str, typer.Argument(help="A pipeline file, a folder, or a preset.")],
    overrides: Overrides = None,
    media: Annotated[
        Path | None,
        typer.Option(help="A picture, or a folder with a clip's frames; a drawn scene if omitted."),
    ] = None,
    question: Annotated[str, typer.Option(help="What to ask about it.")] = _QUESTION,
    batch_size: Annotated[
        list[int] | None,
        typer.Option(min=1, help="How many copies at once; may be repeated.", show_default="1"),
    ] = None,
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens of each answer.")] = 16,
    rounds: Annotated[int, typer.Option(min=1, help="Interleaved pairs that are timed.")] = 5,
    config_only: Annotated[
        bool,
        typer.Option("--config-only", help="From the configuration alone: no weights, no times."),
    ] = False,
    text_tokens: Annotated[
        int, typer.Option(min=0, help="With --config-only: tokens of the prompt that are text.")
    ] = 60,
    visual_tokens: Annotated[
        int | None, typer.Option(min=1, help="With --config-only: visual tokens of the image.")
    ] = None,
    as_json: Json = False,
) -> None:
    """What a pipeline costs, beside the unmodified model. docs/cost.md defines every figure."""
    from tokenreduce.config import load_pipeline
    from tokenreduce_integrations.accounting.bench import compare
    from tokenreduce_integrations.cli import chat

    loaded = load_pipeline(pipeline, overrides or ())
    if config_only:
        _estimate(loaded, visual_tokens, text_tokens, as_json)
        return
    opened = None if media is None else chat.open_media(media)
    question = chat.require_question(question)
    chat.quiet_loading()

    def prompt(processor: Any, device: torch.device) -> Mapping[str, Any]:
        shown = opened
        if shown is None:
            from tokenreduce_integrations.testbed.examples import example_image

            shown = chat.Media("image", (example_image(),))
        return chat.encode(processor, shown, question, device)

    found = compare(
        loaded, prompt, batch_sizes=batch_size or (1,), new_tokens=new_tokens, rounds=rounds
    )
    if as_json:
        print_json(found.as_dict())
        return
    _print(found)


def _estimate(loaded: Any, visual_tokens: int | None, text_tokens: int, as_json: bool) -> None:
    from tokenreduce_integrations.accounting.estimate import estimate_both

    mine, base = estimate_both(loaded, visual_tokens=visual_tokens, text_tokens=text_tokens)
    if as_json:
        print_json({"pipeline": mine.as_dict(), "baseline": base.as_dict()})
        return
    rows = [
        ("parameters, M", f"{mine.parameters / 1e6:,.2f}", f"{base.parameters / 1e6:,.2f}"),
        ("visual tokens, layer average", f"{mine.layer_average:.1f}", f"{base.layer_average:.1f}"),
        ("encoder GFLOPs", _giga(mine.encoder_flops), _giga(base.encoder_flops)),
        ("prefill GFLOPs", _giga(mine.prefill_flops), _giga(base.prefill_flops)),
        ("next token GFLOPs", _giga(mine.decode_flops), _giga(base.decode_flops)),
        ("KV cache MiB", _mebi(mine.kv_bytes), _mebi(base.kv_bytes)),
    ]
    console().print(table(("", ">pipeline", ">unmodified"), rows))


def _print(found: Comparison) -> None:
    out = console()
    mine, base = found.pipeline, found.baseline
    rows: list[tuple[str, ...]] = []

    def row(heading: str, figure: Callable[[Side], str]) -> None:
        rows.append((heading, figure(mine), figure(base)))

    row("parameters, M", lambda side: f"{side.weights.total_parameters / 1e6:,.2f}")
    row("weights, MiB", lambda side: _mebi(side.weights.total_bytes))
    for part in mine.flops.parts:
        rows.append((f"GFLOPs, {part}", *(_giga(side.flops.parts[part]) for side in (mine, base))))
    row("GFLOPs, first token", lambda side: _giga(side.flops.total))
    row("visual tokens, layer average", lambda side: f"{side.layer_average:.1f}")
    row("KV cache of them, MiB", lambda side: _mebi(side.kv_bytes))
    for batch in mine.times:
        for name in ("encoder", "selection", "prefill", "decode"):
            rows.append(
                (
                    f"{name} ms, batch {batch}",
                    *(f"{getattr(side.times[batch], name):.2f}" for side in (mine, base)),
                )
            )
    out.print(table(("", ">pipeline", f">unmodified ({found.attention})"), rows))
    for batch, speedup in found.speedup.items():
        out.print(f"first token at {speedup:.2f}x the speed at batch {batch}", markup=False)
    for warning in found.warnings:
        out.print(f"warning: {warning}", style="yellow", markup=False, soft_wrap=True)
    out.print(str(found.receipt), style="dim", markup=False, soft_wrap=True)


def _giga(flops: int) -> str:
    return f"{flops / 1e9:,.3f}"


def _mebi(size: int | None) -> str:
    return "unknown" if size is None else f"{size / 2**20:,.2f}"
