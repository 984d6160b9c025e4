"""Where settings come from, in one place: flags, then environment, then a TOML file, then defaults.

Every value carries its origin, so that an error can name the flag, the
variable or the file that a person has to change.
"""

from __future__ import annotations

import difflib
import os
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from kvstore.errors import SettingsError
from kvstore.machine import free_disk_bytes, has_tier, memory_bytes
from kvstore.quantities import format_size
from kvstore.settings import Settings
from kvstore.specs import SECRETS, Spec, specs

SPECS: Mapping[str, Spec] = {spec.key: spec for spec in specs()}
_GROUPS = frozenset(key.partition(".")[0] for key in SPECS)


class Given(NamedTuple):
    """A value as it was given, and what its giver would call the place."""

    value: object
    origin: str


Layer = Mapping[str, Given]  # by key, such as "ram.capacity_bytes"


def load(
    flags: Layer | None = None,
    *,
    config: Path | None = None,
    environ: Mapping[str, str] = os.environ,
) -> Settings:
    """The settings in force. Reads one TOML file, the environment, and the size of this machine.

    `config`, or else $KVSTORE_CONFIG, must exist; without either `./kvstore.toml`
    is read, or `~/.config/kvstore/config.toml`, if there is one. Raises
    SettingsError, in one line, for the first thing that is wrong.
    """
    return merge(from_toml(find_config(config, environ)), from_environment(environ), flags or {})


def override(settings: Settings | None, overrides: Mapping[str, object]) -> Settings:
    """`settings`, or the defaults, changed by arguments such as `ram_bytes="1 GiB"`.

    Reads neither files nor environment. Raises SettingsError.
    """
    keys = {spec.name: spec.key for spec in SPECS.values()}
    flags: dict[str, Given] = {}
    for name, value in overrides.items():
        if name not in keys:
            raise SettingsError(f"{name}: no such setting{_nearest(name, keys)}")
        flags[keys[name]] = Given(value, name)
    changed = (settings or Settings()).model_dump(exclude_unset=True)
    return merge(_flatten(changed, origin=""), flags)


def merge(*layers: Layer) -> Settings:
    """Settings from layers, each stronger than those before it."""
    given = {key: value for layer in layers for key, value in layer.items()}
    nested: dict[str, dict[str, object]] = {}
    for key, (value, origin) in given.items():
        if key not in SPECS:
            raise SettingsError(f"{origin}: no such setting{_nearest(key, SPECS)}")
        group, _, field = key.partition(".")
        nested.setdefault(group, {})[field] = value
    try:
        settings = Settings.model_validate(nested)
    except ValidationError as error:
        key = ".".join(str(part) for part in error.errors()[0]["loc"][:2])
        raise _refused(key, given[key]) from None
    _check_fits(settings, given)
    return settings


def from_toml(path: Path | None) -> Layer:
    """The settings of one file; none without a file."""
    if path is None:
        return {}
    try:
        with path.open("rb") as file:
            tables = tomllib.load(file)
    except PermissionError as error:
        raise SettingsError(
            f"{path}: cannot be read: {error.strerror}; make it readable (chmod u+r), or name "
            "another with --config or KVSTORE_CONFIG"
        ) from None
    except OSError as error:
        raise SettingsError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # of the parser, of UTF-8, of huge numbers
        raise SettingsError(f"{path}: not valid TOML: {error}") from None
    return _flatten(tables, origin=f"{path}: ")


def from_environment(environ: Mapping[str, str]) -> Layer:
    """Variables such as KVSTORE_RAM__CAPACITY_BYTES. An empty one counts as not set.

    A misspelt one is an error, but other variables that begin with KVSTORE_ are
    left alone: Kubernetes makes such names for a service called kvstore.
    """
    variables = {spec.variable: spec.key for spec in SPECS.values()}
    one_underscore = {name.replace("__", "_") for name in variables}
    layer: dict[str, Given] = {}
    for name, value in environ.items():
        group = name.removeprefix("KVSTORE_").lower().partition("__")[0]
        if not name.startswith("KVSTORE_") or not value:
            continue
        if name in variables:
            layer[variables[name]] = Given(value, name)
        elif group in _GROUPS or name in one_underscore:
            raise SettingsError(f"{name}: no such setting{_nearest(name, variables)}")
    return layer


def find_config(config: Path | None, environ: Mapping[str, str]) -> Path | None:
    """The file to read: the one asked for, or the first that exists."""
    if config is not None or environ.get("KVSTORE_CONFIG"):
        return config or Path(os.path.expanduser(environ["KVSTORE_CONFIG"]))
    # `os.path` because it takes a home that is missing, or closed to us, for one without a file.
    home = os.path.expanduser(environ.get("XDG_CONFIG_HOME") or "~/.config")
    candidates = (Path("kvstore.toml"), Path(home, "kvstore", "config.toml"))
    return next((path for path in candidates if os.path.isfile(path)), None)


def _flatten(tables: Mapping[str, Any], origin: str) -> Layer:
    layer: dict[str, Given] = {}
    for group, fields in tables.items():
        if group not in _GROUPS:
            raise SettingsError(f"{origin}{group}: no such group{_nearest(group, _GROUPS)}")
        if not isinstance(fields, Mapping):
            raise SettingsError(f"{origin}{group} = {fields!r}: must be a table, [{group}]")
        for field, value in fields.items():
            layer[f"{group}.{field}"] = Given(value, f"{origin}{group}.{field}")
    return layer


def _refused(key: str, given: Given) -> SettingsError:
    shown = "" if key in SECRETS else f" = {_shorten(given.value)}"
    return SettingsError(f"{given.origin}{shown}: must be {SPECS[key].accepts}")


def _check_fits(settings: Settings, given: Layer) -> None:
    """Refuse sizes that this machine cannot have; the arena and the file are allocated at once."""
    limits = [
        ("ram.capacity_bytes", settings.ram.capacity_bytes, memory_bytes(), "of memory here"),
    ]
    engine = settings.engine
    if engine.device == "cpu" and engine.hbm_bytes is not None:
        limits.append(("engine.hbm_bytes", engine.hbm_bytes, memory_bytes(), "of memory here"))
    path = settings.nvme.path
    # One that is there keeps the capacity it was made for, unless another is given.
    if path is not None and ("nvme.capacity_bytes" in given or not has_tier(path)):
        room = free_disk_bytes(path)
        place = f"free for {path}"
        limits.append(("nvme.capacity_bytes", settings.nvme.capacity_bytes, room, place))
    for key, wanted, limit, what in limits:
        if wanted > limit:
            origin = given[key].origin if key in given else f"{key} (default)"
            raise SettingsError(
                f"{origin} = {format_size(wanted)}: more than the {format_size(limit)} {what}"
            )


def _nearest(name: str, known: Iterable[str]) -> str:
    known = list(known)
    near = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {near[0]}?" if near else f" among {', '.join(sorted(known))}"


def _shorten(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
