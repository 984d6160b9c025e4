"""What an engine's settings for its connector may say, and the store that they name."""

from __future__ import annotations

import difflib
import json
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import kvstore
from kvstore.connectors.connector import DEADLINE_S
from kvstore.errors import LayoutError, SettingsError
from kvstore.identity import Namespace
from kvstore.specs import specs
from kvstore.verbs import Store

BLOCK_TOKENS = 16
WHERE = "kv_connector_extra_config"
_OF_A_DAEMON = ("token", "ca", "certificate", "key")
_OURS = ("url", *_OF_A_DAEMON, "salt", "block_tokens", "deadline_s", "namespace")


@dataclass(frozen=True)
class Options:
    """`url` is a daemon's; without it `store` is settings of a store of this process's own."""

    url: str = ""
    credentials: Mapping[str, Any] = field(default_factory=dict)
    store: Mapping[str, Any] = field(default_factory=dict)
    block_tokens: int = BLOCK_TOKENS
    salt: str = ""
    deadline_s: float = DEADLINE_S
    namespace: Namespace | None = None


def read_options(given: Mapping[str, Any], where: str = WHERE) -> Options:
    """`where` is what people call the settings. Those of a store are looked at later.

    Raises SettingsError for what makes no sense.
    """
    rest = dict(given)
    url, salt = rest.pop("url", ""), rest.pop("salt", "")
    credentials = {name: rest.pop(name) for name in _OF_A_DAEMON if name in rest}
    texts = {"url": url, "salt": salt, **credentials}
    wrong = [name for name, value in texts.items() if not isinstance(value, str)]
    if wrong:
        raise SettingsError(f"{where}: {', '.join(wrong)} must be a text")
    if credentials and not url:
        raise SettingsError(f"{where}: credentials, but no url")
    block_tokens = rest.pop("block_tokens", BLOCK_TOKENS)
    if type(block_tokens) is not int or block_tokens < 1:
        raise SettingsError(f"{where}: block_tokens is {block_tokens!r}")
    deadline_s = rest.pop("deadline_s", DEADLINE_S)
    if not isinstance(deadline_s, int | float) or not deadline_s > 0:
        raise SettingsError(f"{where}: deadline_s is {deadline_s!r}")
    namespace = _namespace(rest.pop("namespace", None), where)
    _check_names(rest, where)
    if url and rest:
        raise SettingsError(
            f"{where}: {', '.join(rest)} is for a store of this process's own, "
            f"but url names a daemon"
        )
    if not url and not rest:
        raise SettingsError(
            f"{where} names no store: give the url of a daemon, or settings such "
            "as ram_bytes and nvme_path"
        )
    return Options(url, credentials, rest, block_tokens, salt, float(deadline_s), namespace)


def _check_names(names: Iterable[str], where: str) -> None:
    known = [spec.name for spec in specs()]
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, [*_OURS, *known], n=1)
            hint = f"; did you mean {near[0]}?" if near else f" (there are {', '.join(_OURS)})"
            raise SettingsError(f"{where}: {name}: no such setting{hint}")


def _namespace(given: object, where: str) -> Namespace | None:
    """A namespace's JSON, as a text or as the object it stands for."""
    if given is None:
        return None
    try:
        return Namespace.from_json(given if isinstance(given, str) else json.dumps(given))
    except (TypeError, ValueError, LayoutError) as error:
        raise SettingsError(f"{where}: namespace: {error}") from error


class _Open:
    """Stores open in this process, each with how many have borrowed it."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.stores: dict[str, tuple[Store, int]] = {}


_open = _Open()


class SharedStore:
    """The store of `options`, which those who ask for the same in one process share.

    vLLM makes one connector for its scheduler and one for its worker; where both are in one
    process, so must a store be that is this process's own. The last `close` closes it, which
    waits until NVMe has what RAM holds.
    """

    def __init__(self, options: Options) -> None:
        """Opens it, or connects. Raises as `kvstore.open` and `kvstore.connect` do."""
        said = {"url": options.url, **options.credentials, **options.store}
        self._name = json.dumps(said, sort_keys=True, default=str)
        with _open.lock:
            held = _open.stores.get(self._name)
            self.store = held[0] if held else _open_store(options)
            _open.stores[self._name] = (self.store, held[1] + 1 if held else 1)
        self._closed = False

    def close(self) -> None:
        """May be called twice."""
        with _open.lock:
            if self._closed:
                return
            self._closed = True
            store, borrowers = _open.stores.pop(self._name)
            if borrowers > 1:
                _open.stores[self._name] = (store, borrowers - 1)
                return
        store.close()


def _open_store(options: Options) -> Store:
    if options.url:
        return kvstore.connect(options.url, **options.credentials)
    return kvstore.open(**options.store)
