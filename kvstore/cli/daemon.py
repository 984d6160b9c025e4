"""`kvstore daemon`: one cache for all engines of a machine."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import click

from kvstore.cli.options import settings_options
from kvstore.cli.settings import show_settings

if TYPE_CHECKING:
    from kvstore.settings import Settings


@click.command(short_help="Serve one cache to all engines of this machine.")
@settings_options(
    "ram.capacity_bytes",
    "nvme.path",
    "nvme.capacity_bytes",
    "daemon.socket",
    "daemon.listen",
    "daemon.grpc",
    "daemon.tokens",
    "daemon.http",
    "daemon.log_format",
)
@click.option("--print-config", is_flag=True, help="Show the settings in force, and end.")
def daemon(settings: Settings, print_config: bool) -> None:
    """Keep one cache for all engines of this machine, in the foreground.

    Engines find it by its socket: `--store unix:///path/to/socket`. It ends on SIGTERM or
    Ctrl-C, when it has written to NVMe what has yet to be written. The log goes to stderr.

    \b
    kvstore daemon --ram-bytes 8GiB --nvme-path /var/lib/kvstore --nvme-bytes 100GiB
    kvstore generate --model smollm2 --chat "Hello" --store unix://$XDG_RUNTIME_DIR/kvstore/kvstore.sock
    """
    if print_config:
        show_settings(settings)
        return
    from kvstore.daemon.logs import log_to_stderr
    from kvstore.daemon.serve import serve
    from kvstore.sources import find_config

    log_to_stderr(settings.daemon.log_format)
    asked = click.get_current_context().params["config"]
    serve(settings, find_config(asked, os.environ))
