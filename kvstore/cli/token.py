"""`kvstore token`: what lets an engine of another machine in."""

from __future__ import annotations

import click

from kvstore.cli.options import json_option

RIGHTS_HELP = "What it may do: read, write, admin."


@click.group(short_help="Make tokens for engines of other machines.")
def token() -> None:
    """Make tokens for engines of other machines.

    \b
    kvstore token new --tenant search --quota-bytes 100GiB
    """


@token.command(short_help="Make one, and what the daemon has to know of it.")
@click.option("--tenant", required=True, metavar="NAME", help="Whose blocks it leads to.")
@click.option("--rights", default="read,write", show_default=True, metavar="LIST", help=RIGHTS_HELP)
@click.option("--quota-bytes", metavar="SIZE", help="What the tenant may hold over RAM and NVMe.")
@click.option("--priority-cap", type=int, metavar="N", help="The highest priority it may give.")
@json_option
def new(
    tenant: str, rights: str, quota_bytes: str | None, priority_cap: int | None, as_json: bool
) -> None:
    """Make a token, and show it this once: the file of tokens will hold its digest only.

    Append the lines that begin with [[token]] to the file that `daemon.tokens` names, which
    must be closed to others (chmod 600), and restart the daemon. Give the first line to
    whoever is to come in, as KVSTORE_CLIENT__TOKEN or `client.token`.

    \b
    kvstore token new --tenant search --quota-bytes 100GiB
    """
    from kvstore.cli.console import print_json, show
    from kvstore.daemon.tokens import checked_record, digest_of, new_token
    from kvstore.errors import InputError

    fresh = new_token()
    entry: dict[str, object] = {
        "sha256": digest_of(fresh),
        "tenant": tenant,
        "rights": [each.strip() for each in rights.split(",")],
    }
    if quota_bytes is not None:
        entry["quota_bytes"] = quota_bytes
    if priority_cap is not None:
        entry["priority_cap"] = priority_cap
    try:
        checked_record(entry)
    except ValueError as error:
        field, _, why = str(error).partition(":")
        raise InputError(f"--{field.replace('_', '-')}:{why}") from None
    if as_json:
        print_json({"token": fresh, "entry": entry})
    else:
        show(f"{fresh}\n\n[[token]]\n" + "".join(map(_line, entry.items())))


def _line(field: tuple[str, object]) -> str:
    """Of TOML, whose strings, numbers and lists of strings are written as in JSON."""
    import json

    name, value = field
    return f"{name} = {json.dumps(value)}\n"
