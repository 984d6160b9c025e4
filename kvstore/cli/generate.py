"""`kvstore generate`: the answer to one prompt."""

from __future__ import annotations

import dataclasses
import fcntl
import os
import stat
import struct
import sys
import termios
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kvstore.cli.options import ENGINE_FLAGS, json_option, settings_options
from kvstore.cli.sampling import sampling_options
from kvstore.errors import InputError

if TYPE_CHECKING:
    from kvstore.engine.prompts import Prompt
    from kvstore.settings import Settings


@click.command(short_help="The answer to one prompt.")
@click.argument("prompt", required=False)
@click.option(
    "-f",
    "--file",
    type=click.Path(path_type=Path, readable=False),
    metavar="FILE",
    help="A text that is put before PROMPT.",
)
@click.option("--chat", "as_chat", is_flag=True, help="Put it to the model as a user's message.")
@click.option("-n", type=int, default=1, metavar="N", help="So many answers.")
@sampling_options
@settings_options(*ENGINE_FLAGS)
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

    With --nvme-path, what was computed is found again by the next command.

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

    text = _prompt_text(prompt, file)
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


def _prompt_text(prompt: str | None, file: Path | None) -> str:
    """The file, an empty line, the prompt; stdin stands in for a prompt that is not given."""
    parts = []
    try:
        if file is not None:
            parts.append(file.read_text(encoding="utf-8"))
        if prompt == "-" or (prompt is None and file is None):
            parts.append(sys.stdin.buffer.read().decode())
        else:
            if prompt is not None:
                parts.append(prompt)
            _refuse_piped_text()
    except OSError as error:
        raise InputError(f"{file}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise InputError(f"{file or 'stdin'}: not a text in UTF-8") from None
    text = "\n\n".join(parts)
    if not text.strip():
        raise InputError("there is no prompt: give one, or send text to stdin")
    return text


def _refuse_piped_text() -> None:
    """Raises InputError for text that someone sent and that would not be read.

    Does not wait for any. Of a file on stdin it says nothing: a shell's loop over
    the file's lines has it there.
    """
    if sys.stdin is None or not stat.S_ISFIFO(os.fstat(0).st_mode):
        return
    (waiting,) = struct.unpack("i", fcntl.ioctl(0, termios.FIONREAD, bytes(4)))
    if waiting:
        raise InputError(
            "there is text on stdin besides the prompt: to put it before the prompt give "
            "--file /dev/stdin, to leave it unread < /dev/null"
        )
