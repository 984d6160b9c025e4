"""The command `kvstore`: its subcommands, and what becomes of an error."""

from __future__ import annotations

import io
import logging
import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType
from typing import NoReturn

import click

from kvstore import __version__
from kvstore.cli.bench import bench
from kvstore.cli.chat import chat
from kvstore.cli.daemon import daemon
from kvstore.cli.demo import demo
from kvstore.cli.explain import explain
from kvstore.cli.gc import gc
from kvstore.cli.generate import generate
from kvstore.cli.keep import evict, retain
from kvstore.cli.ls import ls
from kvstore.cli.settings import settings
from kvstore.cli.stat import stat
from kvstore.cli.stdout import Stdout
from kvstore.cli.token import token
from kvstore.cli.top import top
from kvstore.cli.transfer import export, import_
from kvstore.cli.verify import verify
from kvstore.errors import InputError, KVStoreError

BAD_INPUT, FAILED, INTERRUPTED, PIPE_CLOSED = 2, 1, 130, 141
ENDINGS = (signal.SIGTERM, signal.SIGHUP)


class Sections(click.Group):
    """Its help lists the commands in groups, in the order in which one meets them."""

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        width = formatter.width - 6 - max(map(len, self.commands))
        for title, commands in SECTIONS.items():
            with formatter.section(title):
                formatter.write_dl(
                    [(each.name or "", each.get_short_help_str(width)) for each in commands]
                )


@click.group(
    cls=Sections,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Exit status: 0 done, 1 failed or found something wrong, 2 bad input, 130 interrupted, "
    "143 or 129 ended by SIGTERM or SIGHUP.",
)
@click.version_option(__version__, prog_name="kvstore")
def cli() -> None:
    """Keep what a language model has computed, and never compute it twice.

    \b
    kvstore demo                                      see what it does, with a real model
    kvstore generate --model smollm2 --chat "Hello"   one answer
    kvstore chat --model smollm2                      a conversation that can be resumed
    kvstore ls ~/.cache/kvstore/blocks                what an NVMe directory holds
    kvstore daemon --ram-bytes 8GiB                   one cache for all engines of a machine
    kvstore top                                       watch it
    """


SECTIONS = {
    "Answers": (generate, chat, demo),
    "Service": (daemon, token, settings, bench),
    "What a store holds": (stat, top, ls, explain, verify),
    "What it is to hold": (retain, evict, gc, export, import_),
}
for commands in SECTIONS.values():
    for command in commands:
        cli.add_command(command)


def main(args: Sequence[str] | None = None) -> NoReturn:
    """Run one command and end the process. Errors are one line on stderr, never a traceback."""
    if logging.lastResort is not None:  # a warning is told as errors are
        logging.lastResort.setFormatter(logging.Formatter("kvstore: %(message)s"))
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout = Stdout.over(sys.stdout)
    for number in ENDINGS:
        if signal.getsignal(number) is signal.SIG_DFL:  # `nohup` has it ignored
            signal.signal(number, _end)
    sys.exit(run(args))


def _end(number: int, _frame: FrameType | None) -> NoReturn:
    """Leave as after Ctrl-C: whatever is open is closed, and queued writes reach the drive."""
    for each in ENDINGS:  # a terminal that closes says so twice; that must not cut the closing
        signal.signal(each, signal.SIG_IGN)
    raise SystemExit(128 + number)


def run(args: Sequence[str] | None = None) -> int:
    """Run one command, or `--help` without any; returns the exit status."""
    given = list(sys.argv[1:] if args is None else args)
    try:
        # Not `cli.main`: it has ways of its own with a closed pipe and with Ctrl-C.
        with cli.make_context("kvstore", given or ["--help"]) as context:
            status = cli.invoke(context)
        sys.stdout.flush()
        return status or 0
    except click.exceptions.Exit as done:  # after --help and --version
        return done.exit_code
    except click.UsageError as error:
        if isinstance(error, click.exceptions.NoArgsIsHelpError):  # `kvstore token` alone
            print(error.message)
            return BAD_INPUT
        path = error.ctx.command_path if error.ctx else "kvstore"
        return _fail(f"{error.format_message().rstrip('.')} (see {path} --help)", BAD_INPUT)
    except click.ClickException as error:
        return _fail(error.format_message(), BAD_INPUT)
    except InputError as error:
        return _fail(str(error), BAD_INPUT)
    except KVStoreError as error:
        return _fail(str(error), FAILED)
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output has left. Nothing may be written to it any more,
        # not even by the interpreter's own flush at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return PIPE_CLOSED
    except OSError as error:
        return _fail(str(error), FAILED)


def _fail(message: str, status: int) -> int:
    print("kvstore:", " ".join(message.split()), file=sys.stderr)
    return status
