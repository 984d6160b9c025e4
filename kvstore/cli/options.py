"""Flags that several commands share, and how they become settings."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kvstore.errors import SettingsError

if TYPE_CHECKING:
    from kvstore.settings import Settings
    from kvstore.sources import Given

# The settings that have a flag of their own; `--set` reaches the others.
FLAGS = {
    "ram.capacity_bytes": ("--ram-bytes", "SIZE", "Size of the RAM tier."),
    "nvme.path": ("--nvme-path", "DIR", "Keep blocks in this directory as well."),
    "nvme.capacity_bytes": ("--nvme-bytes", "SIZE", "Space for blocks in that directory."),
    "engine.store": ("--store", "URL", "Use the cache of a daemon, such as unix:///path."),
    "engine.model": ("--model", "MODEL", "A Hugging Face folder, a .gguf file, or `smollm2`."),
    "engine.dtype": ("--dtype", "TYPE", "float32, bfloat16, float16, or auto."),
    "engine.kv_dtype": ("--kv-dtype", "TYPE", "KV as fp8 or int8: half the room, other answers."),
    "engine.device": ("--device", "DEVICE", "What to compute on: cpu, cuda, or cuda:1."),
    "engine.hbm_bytes": ("--hbm-bytes", "SIZE", "KV that the engine keeps on its device."),
    "engine.block_tokens": ("--block-tokens", "N", "Tokens in a block."),
    "engine.threads": ("--threads", "N", "CPU threads of the engine."),
    "daemon.socket": ("--socket", "PATH", "Unix socket for engines of this machine."),
    "daemon.listen": ("--listen", "HOST:PORT", "Engines of other machines."),
    "daemon.grpc": ("--grpc", "HOST:PORT", "Programs in other languages."),
    "daemon.tokens": ("--tokens", "FILE", "Whom to let in there; see `kvstore token new`."),
    "daemon.http": ("--http", "HOST:PORT", "Metrics, health and a live page."),
    "daemon.log_format": ("--log-format", "FORMAT", "text, or json: one object a line."),
}

_OWN_STORE = ("ram.", "nvme.", "store.")  # settings of a store in the engine's process

ENGINE_FLAGS = tuple(key for key in FLAGS if not key.startswith("daemon."))

json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print JSON on stdout, and nothing else there."
)


Check = Callable[["Settings", Mapping[str, "Given"]], None]  # of settings, and the flags given


def settings_options(
    *keys: str, check: Check | None = None
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Give a command the flags of `keys`, `--config` and `--set`; it receives `settings`.

    `check` raises SettingsError for flags that make no sense together.
    """

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(command)
        def with_settings(*args: Any, config: Path | None, **options: Any) -> Any:
            from kvstore import sources

            assignments = options.pop("assignments")
            flags = dict(_parse_assignment(text) for text in assignments)
            for key in keys:
                value = options.pop(_parameter(key))
                if value is not None:
                    flags[key] = sources.Given(value, FLAGS[key][0])
            settings = sources.load(flags, config=config)
            if check is not None:
                check(settings, flags)
            return command(*args, settings=settings, **options)

        decorated: Callable[..., Any] = with_settings
        for option in reversed([*map(_option, keys), _config, _assignments]):
            decorated = option(decorated)
        return decorated

    return decorate


def engine_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """All flags of an engine, over a store of its own or over a daemon's."""
    return settings_options(*ENGINE_FLAGS, check=_one_store)(command)


def _one_store(settings: Settings, flags: Mapping[str, Given]) -> None:
    """A daemon's tiers are not the engine's to choose, and what is dropped should be said."""
    if settings.engine.store is None:
        return
    own = [given.origin for key, given in flags.items() if key.startswith(_OWN_STORE)]
    if own:
        named = "--store" if "engine.store" in flags else f"engine.store {settings.engine.store}"
        raise SettingsError(
            f"{own[0]} and {named} do not go together: the daemon has tiers of its own, and is "
            "given their sizes when it starts"
        )


_config = click.option(
    "--config",
    type=click.Path(path_type=Path, readable=False),
    metavar="FILE",
    help="Settings in TOML; otherwise ./kvstore.toml or ~/.config/kvstore/config.toml.",
)
_assignments = click.option(
    "--set",
    "assignments",
    multiple=True,
    metavar="KEY=VALUE",
    help="Any other setting, such as nvme.codec=zstd; `kvstore settings` lists them.",
)


def _option(key: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    flag, metavar, text = FLAGS[key]
    return click.option(flag, _parameter(key), metavar=metavar, help=text, cls=_SettingOption)


class _SettingOption(click.Option):
    """Its help ends with the setting's default, which is looked up when that is asked for.

    Not earlier: other commands and their help do without pydantic.
    """

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        from kvstore.specs import specs

        record = super().get_help_record(ctx)
        default = next(spec.default for spec in specs() if _parameter(spec.key) == self.name)
        if record is None or default == "not set":
            return record
        return record[0], f"{record[1]}  [default: {default}]"


def _parameter(key: str) -> str:
    return key.replace(".", "_")


def _parse_assignment(text: str) -> tuple[str, Any]:
    from kvstore.sources import Given

    key, equals, value = text.partition("=")
    if not equals:
        raise click.BadParameter(f"{text!r} is not KEY=VALUE", param_hint="--set")
    return key.strip(), Given(value.strip(), f"--set {key.strip()}")
