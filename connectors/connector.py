"""What every connector is made of: look up, load and save, between token ids and pages."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple, Self

from kvstore.connectors.accounts import Accounts, ConnectorStats
from kvstore.connectors.convert import Pages
from kvstore.connectors.load import Leg, Load, Target
from kvstore.connectors.shards import Run, find_runs, leading
from kvstore.errors import LayoutError, RequestError
from kvstore.hashing import Chain, TokenChain
from kvstore.identity import Namespace
from kvstore.layout import Shard
from kvstore.planner import LinearCost, Plan, plan_load
from kvstore.retention import Retention
from kvstore.tier import Miss
from kvstore.verbs import Reservation, Store

DEADLINE_S = 5.0  # of a load for which no better bound is known
SAVES_BEHIND = 64  # saves that wait for the thread; more are refused, and counted

Tokens = Sequence[int] | TokenChain | Chain
"""A prompt's token ids, or a chain of them that the caller keeps and extends, or its keys alone.

Keys may begin anywhere in a prompt; tokens and pages are then counted from where they begin.
"""


class Found(NamedTuple):
    """What a load would find of a prompt, after the tokens that the engine has already."""

    tokens: int  # to be loaded
    ready_tokens: int  # of these, the leading ones that are in RAM now


class Saved(NamedTuple):
    """What became of the blocks offered: each is counted once."""

    stored: int
    held: int  # the store had them, whole or in shards
    refused: int  # it had no room, or is away


def check_store(store: object) -> None:
    """Raises RequestError for what has no verbs: an address, for example."""
    if not hasattr(store, "acquire"):
        said = f"{store!r} is" if isinstance(store, str) else f"a {type(store).__name__} is"
        raise RequestError(
            f"{said} no store: give kvstore.connect(url) for a daemon, or kvstore.open(...)"
        )


class Connector:
    """Moves blocks of one namespace between a store and an engine's pages.

    Trouble with the store never raises: it is a miss with a reason, counted, and logged once.
    Pages or block tables that cannot be are the engine's own mistake and raise LayoutError. All
    verbs are safe from any thread, and none waits for I/O. The store stays the caller's.
    """

    def __init__(
        self,
        store: Store,
        namespace: Namespace,
        *,
        heads: Shard | None = None,
        deadline_s: float = DEADLINE_S,
        prefill: LinearCost | None = None,
        accounts: Accounts | None = None,
    ) -> None:
        """`namespace` is of the whole model, `heads` what this rank has of it (None: all).

        `prefill` is the engine's measured cost of computing, which it keeps up to date: what
        would take longer to load than to compute is then left alone. Until it has been measured
        all that is found is loaded, in `deadline_s`. Connectors of one engine may share `accounts`.
        Raises LayoutError for impossible heads, RequestError for what is no store.
        """
        check_store(store)
        self.namespace = namespace
        self.heads = heads or namespace.layout.whole
        self.block_bytes = namespace.layout.shard_range(self.heads)[1]
        self.block_tokens = namespace.block_tokens
        self.prefill = prefill or LinearCost()
        self._store = store
        self._deadline_s = deadline_s
        self._accounts = accounts or Accounts()
        self._behind = threading.BoundedSemaphore(SAVES_BEHIND)
        self._lock = threading.Lock()
        self._thread: ThreadPoolExecutor | None = None
        self._closed = False

    # ---- asking

    def lookup(self, tokens: Tokens, *, start_token: int = 0) -> Found:
        """How many tokens after the first `start_token` a load would find and is worth making.

        An engine must compute a prompt's last token itself, to have its logits: it looks up
        `tokens[:-1]`. No side effect.
        """
        _, runs, plan = self._found(tokens, start_token, _length(tokens))
        tiers = [tier for run in runs for tier in run.tiers][: plan.blocks]
        in_ram = next((i for i, tier in enumerate(tiers) if tier != "ram"), len(tiers))
        first = start_token // self.block_tokens
        found, ready = (
            max(0, (first + blocks) * self.block_tokens - start_token)
            for blocks in (len(tiers), in_ram)
        )
        return Found(found, ready)

    def prefetch(self, tokens: Tokens, *, start_token: int = 0) -> int:
        """Have the store bring into RAM what a load would want; returns how many blocks it does."""
        fetched = 0
        try:
            chain = self._chain(tokens)
            for run in find_runs(self._store, chain, self.heads, start_token // self.block_tokens):
                if run.tiers.count("ram") < len(run.tiers):
                    part = chain.slice(run.start, run.stop)
                    for shard in run.shards:
                        fetched += self._store.prefetch(part.for_shard(shard))
        except Exception as error:
            self._accounts.store_failed("prefetch", error)
        return fetched

    def stats(self) -> ConnectorStats:
        return self._accounts.stats()

    def warn_once(self, kind: str, message: str, *args: object) -> None:
        """Log a warning the first time there is one of this `kind`, and later for debugging."""
        self._accounts.say(kind, message, *args)

    # ---- reading

    def load(
        self,
        tokens: Tokens,
        table: Sequence[int],
        pages: Pages,
        *,
        start_token: int = 0,
        stop_token: int | None = None,
        deadline_s: float | None = None,
    ) -> Load:
        """Start to fill `pages` with tokens `[start_token, stop_token)` of a prompt.

        `table` lists the sequence's physical blocks from its first token on. `stop_token` is for
        what a lookup has promised: all of it is asked for, and what does not come has failed.
        Without it, what is found and worth loading is. Nothing outside is written, so pages that
        others share stay as they are. What has not come after `deadline_s` is a miss. Raises
        LayoutError for pages that are not of this namespace, or not there.
        """
        self._check(pages)
        size = self.block_tokens
        stop = _length(tokens) if stop_token is None else stop_token
        chain, runs, plan = self._found(tokens, start_token, stop)
        miss = Miss.ABSENT if chain is not None else Miss.BREAKER
        if stop_token is None:  # nobody has promised the rest, but it was asked for
            found = sum(len(run.tiers) for run in runs)
            blocks = stop // size - start_token // size
            self._accounts.missed(blocks - found, miss)
            self._accounts.missed(found - plan.blocks, Miss.TOO_SLOW)
            runs = leading(runs, plan.blocks)
        end = max(start_token, min(stop, runs[-1].stop * size)) if runs else start_token
        pages.check_table(table, start_token, end)
        if stop_token is None:
            stop = end
        if deadline_s is None:
            deadline_s = self._deadline_s if plan.deadline_s is None else plan.deadline_s
        legs = self._acquire(chain, runs, deadline_s) if chain else []
        if runs and not legs:
            miss = Miss.BREAKER
        wanted = range(start_token, max(start_token, stop))
        target = Target(pages, list(table), wanted, size, _length(tokens))
        return Load(target, legs, miss if not legs or end < stop else None, self._accounts)

    # ---- writing

    def save(
        self,
        tokens: Tokens,
        table: Sequence[int],
        pages: Pages,
        *,
        start_token: int = 0,
        stop_token: int | None = None,
        retention: Retention | None = None,
    ) -> Saved:
        """Copy the full blocks of tokens `[start_token, stop_token)` out of `pages`.

        All of these tokens must have been computed (`stop_token`: all of `tokens`). The pages
        may be used again when this returns. Blocks that the store has already, under whatever
        sharding, are not copied. Raises LayoutError as `load` does.
        """
        self._check(pages)
        size = self.block_tokens
        first = -(-start_token // size)
        stop = _length(tokens) if stop_token is None else min(stop_token, _length(tokens))
        last = max(first, stop // size)
        pages.check_table(table, first * size, last * size)
        try:
            saved = self._save(self._chain(tokens), first, last, table, pages, retention)
        except LayoutError:
            raise
        except Exception as error:
            self._accounts.store_failed("save", error)
            saved = Saved(0, 0, last - first)
        self._accounts.count("saved_blocks", saved.stored)
        self._accounts.count("refused_blocks", saved.refused)
        return saved

    def save_behind(
        self,
        tokens: Tokens,
        table: Sequence[int],
        pages: Pages,
        *,
        start_token: int = 0,
        stop_token: int | None = None,
        retention: Retention | None = None,
    ) -> Future[Saved]:
        """As `save`, in this connector's thread: the pages are the engine's again when it is done.

        At most `SAVES_BEHIND` wait their turn; one more is refused at once.
        """
        self._check(pages)
        stop = _length(tokens) if stop_token is None else min(stop_token, _length(tokens))
        if isinstance(tokens, TokenChain):
            tokens = tokens.fork()
        elif not isinstance(tokens, Chain):
            tokens = list(tokens)
        table = list(table)
        with self._lock:
            if not self._closed and self._behind.acquire(blocking=False):
                if self._thread is None:
                    self._thread = ThreadPoolExecutor(1, "kvstore-connector")
                future = self._thread.submit(
                    self.save,
                    tokens,
                    table,
                    pages,
                    start_token=start_token,
                    stop_token=stop,
                    retention=retention,
                )
                future.add_done_callback(lambda _: self._behind.release())
                return future
        refused = max(0, stop // self.block_tokens - -(-start_token // self.block_tokens))
        self._accounts.count("refused_blocks", refused)
        future = Future()
        future.set_result(Saved(0, 0, refused))
        return future

    # ---- ending

    def close(self) -> None:
        """Wait for the saves that were begun. May be called twice; the store stays open."""
        with self._lock:
            self._closed = True
            thread, self._thread = self._thread, None
        if thread is not None:
            thread.shutdown()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    # ---- inside

    def _check(self, pages: Pages) -> None:
        pages.layout.check(self.namespace.layout)
        if pages.layout.held != self.heads:
            raise LayoutError(f"the pages hold {pages.layout.held}, the connector {self.heads}")

    def _chain(self, tokens: Tokens) -> Chain:
        """The full blocks. Raises LayoutError for a chain of another namespace."""
        if not isinstance(tokens, TokenChain | Chain):
            tokens = TokenChain(self.namespace, tokens)
        elif tokens.namespace != self.namespace:
            raise LayoutError("the chain of tokens is of another namespace than the connector")
        return tokens if isinstance(tokens, Chain) else tokens.chain()

    def _found(
        self, tokens: Tokens, start_token: int, stop_token: int
    ) -> tuple[Chain | None, list[Run], Plan]:
        """The blocks up to `stop_token`, what of them is stored, and how much is worth loading.

        Nothing, and no chain, where the store fails.
        """
        try:
            chain = self._chain(tokens).slice(0, -(-stop_token // self.block_tokens))
            runs = find_runs(self._store, chain, self.heads, start_token // self.block_tokens)
            plan = plan_load(
                [tier for run in runs for tier in run.tiers],
                self.block_bytes,
                self.block_tokens,
                start_token,
                _length(tokens),
                self._store.load_costs,
                self.prefill,
                self._store.queued_bytes(),
            )
        except LayoutError:
            raise
        except Exception as error:
            self._accounts.store_failed("lookup", error)
            return None, [], Plan(0, None)
        return chain, runs, plan

    def _acquire(self, chain: Chain, runs: list[Run], deadline_s: float) -> list[Leg]:
        """Leases for all of the runs, or none where the store fails."""
        legs: list[Leg] = []
        try:
            for run in runs:
                leg = Leg(run, [])
                legs.append(leg)
                for shard in run.shards:
                    part = chain.slice(run.start, run.stop).for_shard(shard)
                    lease = self._store.acquire(part, deadline_s=deadline_s)
                    leg.leases.append(lease)
        except Exception as error:
            self._accounts.store_failed("load", error)
            for leg in legs:
                leg.release()
            return []
        return legs

    def _save(
        self,
        chain: Chain,
        first: int,
        last: int,
        table: Sequence[int],
        pages: Pages,
        retention: Retention | None,
    ) -> Saved:
        """Blocks `[first, last)` of the chain, but for those that are held."""
        runs = find_runs(self._store, chain.slice(0, last), self.heads, first)
        start = runs[-1].stop if runs else first
        fresh = chain.slice(start, last).for_shard(self.heads)
        if not fresh:
            return Saved(0, last - first, 0)
        with self._store.reserve(fresh, retention=retention) as reservation:
            for index, views in _neighbours(reservation):
                token = (start + index) * self.block_tokens
                pages.copy_out(table, token, views, self.block_tokens)
            stored = reservation.commit()
        absent = self._store.probe(fresh).tiers.count(None) if stored < len(fresh) else 0
        return Saved(stored, last - first - stored - absent, absent)


def _length(tokens: Tokens) -> int:
    if isinstance(tokens, Chain):
        return len(tokens) * tokens.namespace.block_tokens
    return tokens.tokens if isinstance(tokens, TokenChain) else len(tokens)


def _neighbours(reservation: Reservation) -> Iterator[tuple[int, list[memoryview]]]:
    """The slots of consecutive blocks together: the first one's index, and their views."""
    views = reservation.views
    start = 0
    indices = reservation.indices
    for i in range(1, len(indices) + 1):
        if i == len(indices) or indices[i] != indices[i - 1] + 1:
            yield indices[start], list(views[start:i])
            start = i
