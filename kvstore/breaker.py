"""When to stop asking a tier that keeps failing, and when to try it again."""

from __future__ import annotations

FAILURES_TO_OPEN = 3
RETRY_AFTER_S = 10.0


class Breaker:
    """Opens after three failures in a row, or at once when a call is given up unanswered.

    While open it lets one call through every ten seconds, and none while a call
    that was given up still goes on: that call is the trial. Pure: the caller
    says what time it is (any monotonic clock). `allows` may be called from any
    thread, the other methods from one.
    """

    def __init__(self) -> None:
        self._failures = 0
        self._retry_at_s = 0.0
        self._trial = False  # the one call of an open breaker is being made
        self.unanswered = 0  # calls that were given up and still go on

    def allows(self, now_s: float) -> bool:
        """Whether a call may be made now. Changes nothing."""
        if self.unanswered or self._trial:
            return False
        return self._failures < FAILURES_TO_OPEN or now_s >= self._retry_at_s

    def begin(self, now_s: float) -> bool:
        """Whether the caller may make a call now; if so it must say how the call ended."""
        if not self.allows(now_s):
            return False
        self._trial = self._failures >= FAILURES_TO_OPEN
        return True

    def succeeded(self) -> None:
        self._failures = 0
        self._trial = False

    def failed(self, now_s: float) -> None:
        self._retry_at_s = now_s + RETRY_AFTER_S
        self._failures += 1
        self._trial = False

    def gave_up(self, now_s: float) -> None:
        """A call was not answered in time. `answered` must follow when it is after all."""
        self.unanswered += 1
        self._failures = max(self._failures, FAILURES_TO_OPEN - 1)
        self.failed(now_s)

    def answered(self) -> None:
        """A call that was given up has ended; how, `succeeded` or `failed` says."""
        self.unanswered -= 1
