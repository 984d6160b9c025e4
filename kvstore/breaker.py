"""When to stop asking a tier that keeps failing, and when to try it again."""

from __future__ import annotations

FAILURES_TO_OPEN = 3
RETRY_AFTER_S = 10.0


class Breaker:
    """Opens after three failures in a row; lets one try through every ten seconds.

    Pure: the caller says what time it is (any monotonic clock).
    """

    def __init__(self) -> None:
        self._failures = 0
        self._retry_at_s = 0.0

    def allows(self, now_s: float) -> bool:
        """Whether a call may be made now."""
        return self._failures < FAILURES_TO_OPEN or now_s >= self._retry_at_s

    def succeeded(self) -> None:
        self._failures = 0

    def failed(self, now_s: float) -> None:
        self._failures += 1
        self._retry_at_s = now_s + RETRY_AFTER_S
