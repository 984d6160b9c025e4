"""`kvstore settings`: every setting, what it is now, and why it exists."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from kvstore.cli.options import FLAGS, json_option, settings_options
from kvstore.quantities import parse_size, parse_time

if TYPE_CHECKING:
    from kvstore.settings import Settings


@click.command(short_help="Show every setting, what it is now, and why it exists.")
@settings_options(*FLAGS)
@json_option
def settings(settings: Settings, as_json: bool) -> None:
    """Show every setting, what it is now, and why it exists, as a TOML file.

    Flags come before the environment (KVSTORE_RAM__CAPACITY_BYTES), that before the
    TOML file (--config), that before the defaults. Of salt and token only
    whether they are set is shown: in a file they have to be filled in.

    \b
    kvstore settings > kvstore.toml
    KVSTORE_NVME__CODEC=zstd kvstore settings --json
    """
    if not as_json:
        show_settings(settings)
        return
    from kvstore.cli.console import print_json

    print_json(_values(settings))


def show_settings(settings: Settings) -> None:
    """As a TOML file on stdout. What is secret is not shown."""
    from kvstore.cli.console import show
    from kvstore.specs import SECRETS, specs

    values = _values(settings)
    lines = []
    above = None
    for spec in specs():
        group, _, name = spec.key.partition(".")
        if group != above:
            lines += [f"[{group}]"]
            above = group
        lines += [f"# {spec.reason}", f"# Accepted: {spec.accepts}."]
        value = values[group][name]
        # A capacity that nobody gave is the directory's own where there is one already.
        unset = value is None or (
            spec.key == "nvme.capacity_bytes" and name not in settings.nvme.model_fields_set
        )
        if spec.key in SECRETS and getattr(getattr(settings, group), name):
            lines += [f"# {name}: set, not shown", ""]
        else:
            lines += ["# " * unset + f"{name} = {_toml(name, value)}", ""]
    show("\n".join(lines))


def _values(settings: Settings) -> dict[str, dict[str, Any]]:
    """By group and field; nothing of what is secret."""
    from kvstore.specs import SECRETS

    values = settings.model_dump(mode="json")
    for secret in SECRETS:
        group, _, name = secret.partition(".")
        values[group][name] = None
    return values


def _toml(name: str, value: str | float | None) -> str:
    """A value as TOML, in a unit where that says the same."""
    from kvstore.specs import render

    if isinstance(value, (int, float)):
        text = render(name, value)
        parse = parse_size if name.endswith("_bytes") else parse_time
        return f'"{text}"' if text != str(value) and parse(text) == value else str(value)
    return json.dumps(value or "", ensure_ascii=False)
