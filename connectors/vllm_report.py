"""What one side of the vLLM connector has counted since it was last asked."""

from __future__ import annotations

from collections import Counter

from kvstore.connectors.accounts import Accounts, ConnectorStats

LOADED, MISSED, COUNTED = "loaded_tokens", "missed_blocks", "counted"

Counts = dict[str, dict[str, int]]
"""Kind, one of the three above -> name -> number."""


class Report:
    """Belongs to one thread. Looking costs something: it is done when there is `has_news`."""

    def __init__(self, accounts: Accounts) -> None:
        self.has_news = False
        self._accounts = accounts
        self._told = _counts(accounts.stats())

    def take(self) -> Counts | None:
        """None where nothing has been counted since the last time."""
        if not self.has_news:
            return None
        self.has_news = False
        now = _counts(self._accounts.stats())
        before, self._told = self._told, now
        grown = {kind: dict(counts - before[kind]) for kind, counts in now.items()}
        return {kind: counts for kind, counts in grown.items() if counts} or None


def _counts(stats: ConnectorStats) -> dict[str, Counter[str]]:
    usage = stats.usage
    return {
        LOADED: Counter(ram=usage.ram_tokens, nvme=usage.nvme_tokens, remote=usage.remote_tokens),
        MISSED: Counter(stats.misses),
        COUNTED: Counter(stats.counters),
    }
