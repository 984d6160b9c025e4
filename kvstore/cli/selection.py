"""Which blocks a command is about: a namespace's, a prompt's, or all."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kvstore.cli.prompt import chat_option, named_prompt, prompt_text
from kvstore.errors import InputError

if TYPE_CHECKING:
    from kvstore.cli.listing import Listing
    from kvstore.hashing import Chain
    from kvstore.settings import Settings

BATCH_BLOCKS = 256  # that a store is told of at once: its lock is held a millisecond

_namespace = click.option(
    "--namespace", metavar="HEX", help="Blocks of this namespace: how its name begins."
)
_prompt = click.option("--prompt", metavar="TEXT", help="Blocks of this prompt to --model.")
_file = click.option(
    "-f",
    "--file",
    type=click.Path(path_type=Path, readable=False),
    metavar="FILE",
    help="A text that is put before --prompt.",
)


@dataclass(frozen=True)
class Selection:
    """What the flags say. Neither namespace nor chain: all blocks."""

    namespace: str | None
    chain: Chain | None

    @property
    def is_all(self) -> bool:
        return self.namespace is None and self.chain is None

    def of(self, listing: Listing) -> Listing:
        """The part of a listing that is meant. Raises InputError where no namespace is."""
        from kvstore.cli.listing import keyed, named

        if self.namespace is not None:
            return listing.only({named(self.namespace, listing.fingerprints())})
        return listing if self.chain is None else keyed(listing, set(self.chain))


def selection_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The command, which has `NAMING_KEYS` among its settings, receives `selection`."""

    @functools.wraps(command)
    def with_selection(*args: Any, settings: Settings, **options: Any) -> Any:
        given = {name: options.pop(name) for name in ("namespace", "prompt", "file", "as_chat")}
        selection = _select(settings, **given)
        return command(*args, selection=selection, settings=settings, **options)

    decorated: Callable[..., Any] = with_selection
    for option in (chat_option, _file, _prompt, _namespace):
        decorated = option(decorated)
    return decorated


def _select(
    settings: Settings,
    namespace: str | None,
    prompt: str | None,
    file: Path | None,
    as_chat: bool,
) -> Selection:
    if prompt is None and file is None:
        if as_chat:
            raise InputError("--chat goes with --prompt or --file")
        return Selection(namespace, None)
    if namespace is not None:
        raise InputError("--namespace and --prompt do not go together")
    text = prompt_text(prompt, file)
    chain = named_prompt(text, as_chat, settings).chain
    if not len(chain):
        raise InputError(
            f"the prompt is shorter than a block of {chain.namespace.block_tokens} tokens: "
            "nothing of it is stored"
        )
    return Selection(None, chain)


def batches(listing: Listing) -> Iterator[Chain]:
    """All blocks of a listing, ancestors first, but for namespaces without a record.

    A store takes such a batch for a chain, though the blocks are not all of one prompt.
    """
    from kvstore.chains import walk
    from kvstore.frame import names
    from kvstore.hashing import Chain

    rows = listing.held.rows
    owners = names(rows["namespace"])
    parents = dict(zip(names(rows["key"]), names(rows["parent"]), strict=True))
    owner = dict(zip(parents, owners, strict=True))
    for fingerprint, namespace in listing.namespaces.items():
        mine = {key: parent for key, parent in parents.items() if owner[key] == fingerprint}
        keys = [place.key for place in walk(mine)]
        for start in range(0, len(keys), BATCH_BLOCKS):
            batch = tuple(keys[start : start + BATCH_BLOCKS])
            yield Chain(namespace, mine[batch[0]], batch)


def parts(chain: Chain) -> list[Chain]:
    """A chain in pieces of a batch each."""
    return [chain.slice(i, i + BATCH_BLOCKS) for i in range(0, len(chain), BATCH_BLOCKS)]
