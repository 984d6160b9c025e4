"""The text of a prompt: from the command line, a file, or stdin; and the chain of its blocks."""

from __future__ import annotations

import fcntl
import os
import stat
import struct
import sys
import termios
from pathlib import Path
from typing import TYPE_CHECKING

import click

from kvstore.errors import InputError

if TYPE_CHECKING:
    from kvstore.engine.naming import NamedPrompt
    from kvstore.engine.prompts import Prompt
    from kvstore.settings import Settings

# What names a prompt's blocks, besides its text.
NAMING_KEYS = ("engine.model", "engine.dtype", "engine.kv_dtype", "engine.block_tokens")

file_option = click.option(
    "-f",
    "--file",
    type=click.Path(path_type=Path, readable=False),
    metavar="FILE",
    help="A text that is put before PROMPT.",
)
chat_option = click.option(
    "--chat", "as_chat", is_flag=True, help="Put it to the model as a user's message."
)


def named_prompt(text: str, as_chat: bool, settings: Settings) -> NamedPrompt:
    """The blocks of a prompt, as `kvstore generate` with these settings would store them."""
    from kvstore.cli.running import engine_extra, model_path, set_threads

    set_threads(settings)
    asked = settings.engine
    path = model_path(asked.model)
    with engine_extra():
        from kvstore.engine.naming import name_prompt
    prompt: Prompt = [{"role": "user", "content": text}] if as_chat else text
    return name_prompt(
        path,
        prompt,
        dtype=asked.dtype,
        block_tokens=asked.block_tokens,
        kv_dtype=asked.kv_dtype,
        salt=settings.tenant.salt,
    )


def prompt_text(prompt: str | None, file: Path | None) -> str:
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
