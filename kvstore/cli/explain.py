"""`kvstore explain`: how much of a prompt a store has, where it breaks off, and why."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kvstore.cli.options import json_option
from kvstore.cli.prompt import NAMING_KEYS, chat_option, file_option, named_prompt, prompt_text
from kvstore.cli.target import WHICH, Place, opened, place_options
from kvstore.quantities import counted, format_size

if TYPE_CHECKING:
    from kvstore.answers import Explanation
    from kvstore.engine.naming import NamedPrompt
    from kvstore.settings import Settings

SHOWN_CHARACTERS = 60  # of the text where the chain breaks
TIERS = {"ram": "in RAM", "nvme": "on NVMe", "remote": "remote", None: "not held"}
REASONS = {
    "absent": "it was never stored here, or so long ago that nothing is known of it",
    "evicted": "it was here, and had to make room or was evicted by hand",
    "identity": "nothing is stored under this namespace; the nearest differs in what follows",
    "checksum": "its bytes were damaged",
    "breaker": "it is on NVMe, which does not answer at the moment",
}


@click.command(
    short_help="Where a prompt's chain breaks, and why.",
    help=f"""Say how much of PROMPT a store has for MODEL, where that ends, and why there.

    The prompt is read as `kvstore generate` with the same flags would: mind --chat, and
    --dtype and --block-tokens where they are not the defaults. A "-" for PROMPT stands for
    stdin. No weights are loaded.

    {WHICH}

    \b
    kvstore explain "Why is the sky blue?" --chat --model smollm2
    kvstore explain "What is this about?" ./blocks --chat -f README.md --model smollm2
    kvstore explain - --store unix:///run/kvstore/kvstore.sock --model ./llama < prompt.txt
    """,
)
@click.argument("prompt")
@file_option
@chat_option
@place_options(*NAMING_KEYS)
@json_option
def explain(
    prompt: str,
    file: Path | None,
    as_chat: bool,
    place: Place,
    settings: Settings,
    as_json: bool,
) -> None:
    from kvstore.cli.console import print_json

    text = prompt_text(prompt if file is None else prompt or None, file)
    asked = named_prompt(text, as_chat, settings)
    with opened(place, settings) as store:
        explanation = store.store.explain(asked.chain)
        tiers = store.store.probe(asked.chain).tiers
        renamed = store.renames_keys
        if store.client is not None:
            store.client.check_connected()
    report = {
        "store": str(place),
        "model": asked.chain.namespace.model,
        # A tenant's has a name that only the daemon knows.
        "namespace": None if renamed else asked.chain.namespace.fingerprint.hex(),
        "tokens": len(asked.tokens),
        "block_tokens": asked.chain.namespace.block_tokens,
        "block_bytes": asked.chain.namespace.layout.block_bytes,
        **explanation.to_dict(),
        "breaks_at_text": _text_at(asked, explanation.breaks_at),
        "stretches": _stretches(tiers),
    }
    if as_json:
        print_json(report)
    else:
        _show(report, explanation)


def _stretches(tiers: list[str | None]) -> list[dict[str, Any]]:
    """Runs of blocks that are in the same place: `[start, stop)`."""
    stretches = []
    start = 0
    for tier, run in groupby(tiers):
        stop = start + sum(1 for _ in run)
        stretches.append({"tier": tier, "start": start, "stop": stop})
        start = stop
    return stretches


def _text_at(asked: NamedPrompt, block: int | None) -> str | None:
    """The prompt's text from the beginning of a block on, as far as the block goes."""
    if block is None:
        return None
    size = asked.chain.namespace.block_tokens
    tokens = asked.tokens[block * size : (block + 1) * size]
    return asked.model.tokenizer.decode(tokens, skip_special_tokens=False)


def _show(report: dict[str, Any], explanation: Explanation) -> None:
    from kvstore.cli.console import show

    size, blocks = report["block_tokens"], report["blocks"]
    over = report["tokens"] - blocks * size
    rest = f"; {counted(over, 'token')} more, in no full block, always computed" if over else ""
    show(
        f"{report['model']}, namespace {report['namespace'] or 'of this tenant alone'}\n"
        f"{counted(report['tokens'], 'token')}: {counted(blocks, 'block')} of {size}, "
        f"{format_size(report['block_bytes'])} each{rest}\n"
    )
    for each in report["stretches"]:
        first, last = each["start"], each["stop"] - 1
        which = f"block {first}" if first == last else f"blocks {first} to {last}"
        show(f"{which}: {TIERS.get(each['tier'], each['tier'])}\n")
    if explanation.breaks_at is None:
        show("All of it is held.\n" if blocks else "Nothing of it can be held.\n")
        return
    text = " ".join((report["breaks_at_text"] or "").split())
    shown = text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + "..."
    why = REASONS.get(explanation.reason or "", explanation.reason or "")
    show(
        f"The chain breaks at block {explanation.breaks_at}, token {explanation.breaks_at * size} "
        f'("{shown}"): {explanation.reason}: {why}.\n'
    )
    for name, (ours, theirs) in explanation.differences.items():
        show(f"  {name} is {ours!r}, stored is {theirs!r}\n")
