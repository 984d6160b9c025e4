"""Questions of a scheduler to a store, answered in a thread: the scheduler never waits for one."""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as NotYetError
from dataclasses import dataclass

from kvstore.connectors.accounts import Accounts
from kvstore.connectors.connector import DEADLINE_S, Connector, Found
from kvstore.connectors.vllm_prefill import patience_s
from kvstore.hashing import Chain

GRACE_S = 0.001  # of a step, for all answers together: most come in less
LATE_S = 0.5  # after that the prompt is computed without the store
STALLED_S = 0.2  # a prefetch that brings nothing for so long is not waited for
FRESH_S = 1.0  # how long an answer is believed
ROUND_S = 0.002  # between two looks at a prefetch that runs


@dataclass
class Question:
    """What would a load of `chain` after its first `start` tokens find?"""

    connector: Connector
    chain: Chain
    start: int
    future: Future[Found]
    asked_s: float
    had_grace: bool = False
    ready: int = -1  # tokens in RAM, when we last looked
    progress_s: float = 0.0
    tokens: int | None = None  # the answer


class Lookups:
    """One thread that looks up and prefetches. `ask` and `answer` belong to the scheduler."""

    def __init__(self, accounts: Accounts) -> None:
        self._accounts = accounts
        self._thread = ThreadPoolExecutor(1, "kvstore-lookup")
        self._stuck: Future[Found] | None = None
        self._grace_s = GRACE_S

    def step_begins(self) -> None:
        """There is time again to wait for an answer."""
        self._grace_s = GRACE_S

    def ask(self, connector: Connector, chain: Chain, start: int) -> Question:
        now_s = time.monotonic()
        if self._stuck is not None and not self._stuck.done():
            # The store answers nobody: ask it nothing more until it does.
            future: Future[Found] = Future()
            future.set_result(Found(0, 0))
        else:
            self._stuck = None
            future = self._thread.submit(_look, connector, chain, start)
        self._accounts.count("lookups")
        return Question(connector, chain, start, future, now_s, progress_s=now_s)

    def answer(self, question: Question, waited_s: float) -> int | None:
        """How many tokens to load, all of them in RAM; None while that is not known.

        `waited_s` is how long the request has been kept from being computed by this.
        """
        if question.tokens is None:
            question.tokens = self._answer(question, waited_s)
        return question.tokens

    def _answer(self, question: Question, waited_s: float) -> int | None:
        now_s = time.monotonic()
        try:
            found = self._result(question)
        except NotYetError:
            if now_s - question.asked_s < LATE_S:
                return None
            self._accounts.count("late_lookups")
            self._accounts.say("late", "the store does not answer, going on without it")
            self._stuck = question.future
            return 0
        except Exception as error:
            self._accounts.store_failed("lookup", error)
            return 0
        if found.ready_tokens >= found.tokens:
            return found.tokens
        if found.ready_tokens > question.ready:
            question.ready, question.progress_s = found.ready_tokens, now_s
        elif now_s - question.progress_s > STALLED_S:
            return found.ready_tokens
        stop = question.start + found.tokens
        if waited_s > (patience_s(question.connector.prefill, question.start, stop) or DEADLINE_S):
            return found.ready_tokens
        if now_s - question.asked_s > ROUND_S:
            question.asked_s = now_s
            question.future = self._thread.submit(
                _look, question.connector, question.chain, question.start
            )
        return None

    def _result(self, question: Question) -> Found:
        """Waits for a moment where it is the first time, and the step has time left for it."""
        if question.had_grace or self._grace_s <= 0:
            return question.future.result(0)
        question.had_grace = True
        start_s = time.monotonic()
        try:
            return question.future.result(self._grace_s)
        finally:
            self._grace_s -= time.monotonic() - start_s

    def is_fresh(self, question: Question) -> bool:
        """Whether the store was asked a moment ago."""
        return time.monotonic() - question.asked_s < FRESH_S

    def close(self) -> None:
        """Ask nothing more. A question that is being asked is not waited for; see `join`."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def join(self) -> None:
        """After `close`: wait for the question that was being asked."""
        self._thread.shutdown()


def _look(connector: Connector, chain: Chain, start: int) -> Found:
    found = connector.lookup(chain, start_token=start)
    if found.ready_tokens < found.tokens:
        size = connector.block_tokens
        connector.prefetch(chain.slice(0, (start + found.tokens) // size), start_token=start)
    return found
