"""``tokenreduce serve``."""

from __future__ import annotations

import shlex
from typing import Annotated

import typer

from tokenreduce_integrations.cli.output import console, table


def serve(
    pipeline: Annotated[str, typer.Argument(help="A pipeline file, a folder, or a preset.")],
    settings: Annotated[
        list[str] | None,
        typer.Argument(
            help="Values to replace, as in reduce.0.reduction=8; and after -- arguments of vLLM, "
            "as in -- --port 8001.",
            show_default=False,
        ),
    ] = None,
    query: Annotated[
        str | None,
        typer.Option(
            help="The text that a prompt-aware strategy compares pictures with where a request "
            "gives none."
        ),
    ] = None,
    trust_requests: Annotated[
        bool,
        typer.Option(
            "--trust-requests",
            help="Let requests choose strategy, budget and query; only for clients that you trust.",
        ),
    ] = False,
    print_only: Annotated[
        bool, typer.Option("--print", help="Print the command of vLLM, and do not run it.")
    ] = False,
) -> None:
    """Serve a pipeline with vLLM, over the API of OpenAI."""
    import os

    from tokenreduce.config import load_pipeline
    from tokenreduce.errors import ServingError
    from tokenreduce_integrations.vllm import release, serving

    given = settings or []
    own = next((i for i, each in enumerate(given) if each.startswith("-")), len(given))
    loaded = load_pipeline(pipeline, given[:own])
    parts = serving.parts(loaded)
    refused = sum(bool(part.reason) for part in parts)
    if refused:
        rows = [(part.name, part.what, part.reason or "served") for part in parts]
        console().print(table(("part", "what", "by vLLM"), rows))
        raise ServingError(f"{pipeline}: vLLM cannot serve {refused} of its {len(parts)} parts.")
    server = serving.Server.of(loaded, query)
    found = release.installed_build()
    build = release.require_supported_release() if not print_only else found[0] if found else "vllm"
    command = server.command(given[own:], trust_requests=trust_requests, build=build)
    if print_only:
        typer.echo(shlex.join(command))
        return
    program = serving.program(command[0])
    typer.echo(shlex.join(command), err=True)
    # In the place of this process, so that signals and the exit status are those of vLLM.
    os.execv(program, command)
