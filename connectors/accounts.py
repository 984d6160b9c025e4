"""What a connector has done, counted; and what went wrong, said once."""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from kvstore.tier import Miss

log = logging.getLogger("kvstore.connectors")


@dataclass(frozen=True, slots=True)
class Usage:
    """Where the KV of a prompt's tokens came from; the five together are all of them."""

    hbm_tokens: int = 0  # the engine had them itself
    ram_tokens: int = 0
    nvme_tokens: int = 0
    remote_tokens: int = 0
    recomputed_tokens: int = 0

    @property
    def prompt_tokens(self) -> int:
        return (
            self.hbm_tokens
            + self.ram_tokens
            + self.nvme_tokens
            + self.remote_tokens
            + self.recomputed_tokens
        )


def usage_of(prompt_tokens: int, hbm_tokens: int, loaded: Mapping[str, int]) -> Usage:
    """`loaded` is tokens by the tier that they came from; the rest was recomputed."""
    ram, nvme = loaded.get("ram", 0), loaded.get("nvme", 0)
    remote = sum(loaded.values()) - ram - nvme
    recomputed = prompt_tokens - hbm_tokens - ram - nvme - remote
    return Usage(hbm_tokens, ram, nvme, remote, recomputed)


@dataclass(frozen=True, slots=True)
class ConnectorStats:
    """Counters since the connector was made."""

    usage: Usage  # of all loads together
    misses: Mapping[str, int]  # blocks asked for and not loaded, by reason
    counters: Mapping[str, int]  # loads, loaded_blocks, saved_blocks, refused_blocks, store_errors


class Accounts:
    """Counts for one connector, from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._tokens: Counter[str] = Counter()
        self._misses: Counter[str] = Counter()
        self._counters: Counter[str] = Counter()
        self._said: set[str] = set()

    def loaded(self, usage: Usage, blocks: int) -> None:
        """A load has ended, by which `blocks` came."""
        with self._lock:
            for name in Usage.__slots__:
                self._tokens[name] += getattr(usage, name)
            self._counters["loads"] += 1
            self._counters["loaded_blocks"] += blocks

    def missed(self, blocks: int, miss: Miss | None) -> None:
        """Blocks were asked for and are not loaded."""
        if miss is not None and blocks:
            with self._lock:
                self._misses[miss.value] += blocks

    def count(self, name: str, number: int = 1) -> None:
        with self._lock:
            self._counters[name] += number

    def store_failed(self, action: str, error: Exception) -> None:
        """The store has raised: counted, and said the first time."""
        self.count("store_errors")
        # Its text: a log that keeps an error keeps its frames, and their buffers.
        self.say(action, "the store failed (%s), going on without it: %s", action, repr(error))

    def say(self, kind: str, message: str, *args: object) -> None:
        """A warning the first time there is one of its kind; later ones are for debugging."""
        with self._lock:
            is_first = kind not in self._said
            self._said.add(kind)
        log.log(logging.WARNING if is_first else logging.DEBUG, message, *args)

    def stats(self) -> ConnectorStats:
        with self._lock:
            usage = Usage(**{name: self._tokens[name] for name in Usage.__slots__})
            return ConnectorStats(usage, dict(self._misses), dict(self._counters))
