"""`kvstore chat`: a conversation that goes on where it was left."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from kvstore.cli.options import engine_options
from kvstore.cli.sampling import sampling_options
from kvstore.errors import InputError

if TYPE_CHECKING:
    from kvstore.cli.conversation import Conversation
    from kvstore.engine.engine import Engine
    from kvstore.engine.sampling_params import SamplingParams
    from kvstore.settings import Settings

COMMANDS = "/exit leaves, /reset starts afresh, /history shows what was said, /help shows this"


@click.command(short_help="A conversation that can be left and resumed.")
@click.argument("name", default="default")
@click.option(
    "--system", metavar="TEXT", help="What the model is told first, in a new conversation."
)
@sampling_options
@engine_options
def chat(name: str, system: str | None, sampling: dict[str, Any], settings: Settings) -> None:
    """Talk with a model. NAME is the conversation: it is saved after every answer,
    and the same name resumes it.

    Each line is a message. These are commands: /exit leaves (as does Ctrl-D),
    /reset starts afresh, /history shows what was said, /help lists them. Ctrl-C
    ends an answer. Conversations are files in ~/.local/state/kvstore/chats.

    \b
    kvstore chat --model smollm2
    kvstore chat holiday --model smollm2 --system "You are a travel agent."
    kvstore chat holiday                           go on, with the model of before
    echo "Where were we?" | kvstore chat holiday
    """
    from kvstore.cli.console import note
    from kvstore.cli.conversation import Conversation
    from kvstore.cli.running import running_engine, set_threads
    from kvstore.engine.sampling_params import SamplingParams

    set_threads(settings)
    conversation = Conversation.open(name)
    if system is not None:
        conversation.instruct(system)
    params = SamplingParams(**sampling)
    model = settings.engine.model or conversation.model
    settings = settings.model_copy(
        update={"engine": settings.engine.model_copy(update={"model": model})}
    )
    conversation.model = model and _lasting(model)
    with running_engine(settings) as engine:
        note(f"{name}: {len(conversation.messages)} messages so far, saved in {conversation.path}")
        note(COMMANDS)
        for line in _lines():
            if line == "/exit":
                break
            if line.startswith("/"):
                _obey(line, conversation)
            elif line.strip():
                _turn(engine, conversation, line, params)


def _lasting(model: str) -> str:
    """The model's name, good from any working directory."""
    path = os.path.expanduser(model)
    return os.path.realpath(path) if os.path.exists(path) else model


def _lines() -> Iterator[str]:
    """What the person types, or what comes through the pipe, a line each."""
    if not sys.stdin.isatty():
        for line in sys.stdin.buffer:
            yield line.decode(errors="replace").rstrip("\r\n")
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  gives `input` a history and arrow keys
    while True:
        try:
            yield input("> ")
        except EOFError:
            print()
            return


def _obey(command: str, conversation: Conversation) -> None:
    if command == "/reset":
        conversation.messages = [m for m in conversation.messages if m["role"] == "system"]
        conversation.save()
    elif command == "/history":
        for message in conversation.messages:
            print(f"{message['role']}: {message['content']}")
    else:
        print(COMMANDS if command == "/help" else f"{command}? {COMMANDS}", file=sys.stderr)


def _turn(engine: Engine, conversation: Conversation, line: str, params: SamplingParams) -> None:
    """One message and its answer. Of an answer that is cut off, what was said is kept."""
    from kvstore.cli.console import note, show
    from kvstore.cli.running import answer, summary

    asked = [*conversation.messages, {"role": "user", "content": line}]
    said: list[str] = []

    def say(text: str) -> None:
        said.append(text)
        show(text)

    try:
        output = answer(engine, asked, params, say)
        show("\n")
        note(summary(output.usage))
    except KeyboardInterrupt:
        show("\n")
    except InputError as error:
        if not sys.stdin.isatty():
            raise
        note(str(error))
    finally:
        if said:
            conversation.messages = [*asked, {"role": "assistant", "content": "".join(said)}]
            conversation.save()
