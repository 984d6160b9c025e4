"""`kvstore generate`: the answer to one prompt."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kvstore.cli.options import engine_options, json_option
from kvstore.cli.prompt import chat_option, file_option, prompt_text
from kvstore.cli.sampling import sampling_options

if TYPE_CHECKING:
    from kvstore.engine.prompts import Prompt
    from kvstore.settings import Settings


@click.command(short_help="The answer to one prompt.")
@click.argument("prompt", required=False)
@file_option
@chat_option
@click.option("-n", type=int, default=1, metavar="N", help="So many answers.")
@sampling_options
@engine_options
@json_option
def generate(
    prompt: str | None,
    file: Path | None,
    as_chat: bool,
    n: int,
    sampling: dict[str, Any],
    settings: Settings,
    as_json: bool,
) -> None:
    """Print what a model makes of PROMPT, or of what comes on stdin.

    With --nvme-path, what was computed is found again by the next command. Where the prompt
    came from is told on a terminal, and by --json (`usage`) everywhere.

    \b
    kvstore generate --model smollm2 --chat "Why is the sky blue?"
    kvstore generate --model ./Llama-3.2-1B --max-tokens 50 "Once upon a time"
    kvstore generate --model smollm2 --nvme-path ~/.cache/kvstore/blocks \\
        --chat --file README.md "What is this about?"
    git log | kvstore generate --model ./model.gguf --json
    """
    from kvstore.cli.console import note, print_json, show
    from kvstore.cli.running import answer, running_engine, set_threads, summary
    from kvstore.engine.sampling_params import SamplingParams

    text = prompt_text(prompt, file)
    set_threads(settings)
    params = SamplingParams(n=n, **sampling)
    streaming = n == 1 and not as_json
    with running_engine(settings) as engine:
        asked: Prompt = [{"role": "user", "content": text}] if as_chat else text
        output = answer(engine, asked, params, show if streaming else len)
        if as_json:
            print_json(dataclasses.asdict(output))
            return
        if streaming:
            show("\n")
        else:
            for completion in output.completions:
                show(f"[{completion.index + 1}] {completion.text}\n")
        note(summary(output.usage))
