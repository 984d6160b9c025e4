"""In place of `torch.cuda`: streams on which every operation takes as long as it is told to.

The clock is virtual. The host moves it by what it does itself, and waits for the device where it
would: at a synchronisation, and at a stream that has `depth` operations waiting already.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

from kvstore.bench.card import Work

HEAD_START_S = 0.01
_QUERY_S = 2e-6


class Queue:
    def __init__(self, cuda: SimulatedCuda) -> None:
        self._cuda = cuda
        self.operations: list[tuple[float, float]] = []  # when each begins and is over

    @property
    def over_s(self) -> float:
        return self.operations[-1][1] if self.operations else 0.0

    def operate(self, seconds: float) -> None:
        if len(self.operations) >= self._cuda.depth:
            room_s = self.operations[-self._cuda.depth][1]
            self._cuda.now_s = max(self._cuda.now_s, room_s)
        begin_s = max(self._cuda.now_s, self.over_s)
        self.operations.append((begin_s, begin_s + seconds))

    def record_event(self) -> Mark:
        event = Mark(self._cuda)
        event.over_s = max(self._cuda.now_s, self.over_s)
        return event

    def is_busy(self, begin_s: float, end_s: float) -> bool:
        """Whether operations follow one another without a gap from `begin_s` until `end_s`."""
        pauses = [(end, begin) for (_, end), (begin, _) in pairwise(self.operations) if begin > end]
        covered = self.operations[0][0] <= begin_s and self.over_s >= end_s
        return covered and not any(end < end_s and begin > begin_s for end, begin in pauses)


class Mark:
    def __init__(self, cuda: SimulatedCuda, enable_timing: bool = False) -> None:
        self._cuda = cuda
        self.over_s = 0.0

    def record(self) -> None:
        self.over_s = self._cuda.current.record_event().over_s

    def query(self) -> bool:
        self._cuda.now_s += _QUERY_S
        return self.over_s <= self._cuda.now_s

    def synchronize(self) -> None:
        self._cuda.now_s = max(self._cuda.now_s, self.over_s)

    def elapsed_time(self, end: Mark) -> float:
        return (end.over_s - self.over_s) * 1e3


class SimulatedCuda:
    def __init__(self, depth: int = 1024) -> None:
        self.depth = depth
        self.now_s = 1.0  # on the host
        self.main = self.current = Queue(self)
        self.sides: list[Queue] = []

    def work(self, host_s: float, operations: int, operation_s: float) -> Work:
        """Takes the host `host_s` for each of its operations."""

        def start() -> None:
            for _ in range(operations):
                self.now_s += host_s
                self.current.operate(operation_s)

        return start

    def set_device(self, device: Any) -> None: ...

    def Event(self, enable_timing: bool = False) -> Mark:  # noqa: N802
        return Mark(self)

    def Stream(self, device: Any) -> Queue:  # noqa: N802
        self.sides.append(Queue(self))
        return self.sides[-1]

    @contextmanager
    def stream(self, stream: Queue) -> Iterator[None]:
        self.current = stream
        yield
        self.current = self.main

    def synchronize(self, device: Any) -> None:
        self.now_s = max(self.now_s, *(each.over_s for each in (self.main, *self.sides)))

    def _sleep(self, cycles: int) -> None:
        self.current.operate(HEAD_START_S)

    @property
    def clock(self) -> Callable[[], float]:
        return lambda: self.now_s
