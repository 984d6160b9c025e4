"""`kvstore settings`: every setting, what it is now, and why it exists."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from kvstore.cli.options import FLAGS, json_option, settings_options

if TYPE_CHECKING:
    from kvstore.settings import Settings


@click.command()
@settings_options(*FLAGS)
@json_option
def settings(settings: Settings, as_json: bool) -> None:
    """Show every setting: the value in force, what is accepted, and why it exists.

    Flags come before the environment (KVSTORE_RAM__CAPACITY_BYTES), that before the
    TOML file, that before the defaults.

    \b
    kvstore settings
    KVSTORE_NVME__CODEC=zstd kvstore settings --json
    """
    from kvstore.settings import render, specs

    values = settings.model_dump(mode="json")
    if values["tenant"]["salt"]:
        values["tenant"]["salt"] = "(secret)"
    if as_json:
        from kvstore.cli.console import print_json

        print_json(values)
        return
    from rich.table import Table

    from kvstore.cli.console import out

    table = Table("setting", "value", "accepts", "why", box=None, pad_edge=False)
    for spec in specs():
        group, _, name = spec.key.partition(".")
        value = values[group][name]
        table.add_row(spec.key, render(name, value) if value else "not set", spec.accepts, spec.reason)
    out.print(table)
