"""The device that is measured: its clock, its streams, and its memory."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from kvstore.bench.company import Repeated
from kvstore.bench.driver import driver_facts
from kvstore.bench.rows import NotHereError
from kvstore.bench.turns import timed
from kvstore.engine.decode_steps import Capture, GraphCapture
from kvstore.engine.device_name import torch_device
from kvstore.errors import SettingsError
from kvstore.kernels.block_copies import BlockCopies
from kvstore.kernels.block_copy_cuda import KernelCopies
from kvstore.kernels.cuda_module import Runtime
from kvstore.kernels.paged_tensors import PagedTensors
from kvstore.kernels.pinned_memory import PINNED
from kvstore.layout import BlockLayout
from kvstore.tiers.hbm_cuda import fastest_copies

Work = Callable[[], object]  # starts something on torch's current stream

# The device sleeps so long before it is measured, in its cycles: about 10 ms, in which the host
# gets ahead of it. What is measured is then the device, and not how fast work is given to it.
_HEAD_START_CYCLES = 20_000_000
# Of company, so much is started in advance: the host is away while it starts what is measured.
_AHEAD_S = 0.02


class Card(Protocol):
    """One for a run of benchmarks; belongs to one thread. The tests have one without a device."""

    @property
    def device(self) -> torch.device: ...

    @property
    def runtime(self) -> Runtime | None:
        """Launches kernels; None: the one that launchers choose for tensors on `device`."""
        ...

    def seconds(self, work: Work) -> float:
        """How long the device takes for `work`. Waits for it."""
        ...

    def seconds_at_once(self, works: Sequence[Work]) -> float:
        """Until the last of `works` is done, each on a stream of its own."""
        ...

    def seconds_beside(self, work: Work, company: Sequence[Work]) -> float:
        """For `work`, while each of `company` is repeated on a stream of its own until it is done.

        Raises NotHereError where to start `company` takes the host longer than it lasts, and
        RuntimeError where it ended first, also with twice as much started in advance.
        """
        ...

    def pinned(self, nbytes: int) -> Tensor:
        """uint8 [nbytes] of host memory that the device reaches."""
        ...

    def pin(self, memory: memoryview) -> bool:
        """Whether the device reaches `memory`, which is pinned for it. Blocks, for seconds."""
        ...

    def capture(self) -> Capture:
        """Makes of a computation what can be replayed: CUDA graphs, where there are any."""
        ...

    def tier_copies(self, pages: PagedTensors, layout: BlockLayout) -> BlockCopies:
        """The way in which the HBM tier copies whole blocks here. May measure; keeps the pages."""
        ...

    def free_bytes(self) -> int: ...

    def clear(self) -> None:
        """Give back the memory that nobody uses any more."""
        ...

    def facts(self) -> dict[str, Any]:
        """What it is, for who reads the figures."""
        ...


class CudaCard:
    """One CUDA device, timed with its own events."""

    runtime: Runtime | None = None

    def __init__(self, device: torch.device) -> None:
        self.device = device
        torch.cuda.set_device(device)
        self._streams: list[Any] = []

    def seconds(self, work: Work) -> float:
        begin, end = _event(), _event()
        self._head_start()
        begin.record()
        work()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3

    def seconds_at_once(self, works: Sequence[Work]) -> float:
        begin, end = _event(), _event()
        here = torch.cuda.current_stream(self.device)
        self._head_start()
        begin.record()
        for stream, work in zip(self._side_streams(len(works)), works, strict=True):
            stream.wait_event(begin)
            with torch.cuda.stream(stream):
                work()
            here.wait_stream(stream)
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3

    def seconds_beside(self, work: Work, company: Sequence[Work]) -> float:
        done_s = [min(self.seconds(each) for _ in range(2)) for each in company]
        told_s = 0.0
        for each in company:
            torch.cuda.synchronize(self.device)  # or it would wait for room behind the one before
            told_s += timed(each)()
        if told_s >= min(done_s):
            raise NotHereError(
                f"copies are shorter than their launch: {min(done_s) * 1e6:.0f} us, and to start "
                f"them takes {told_s * 1e6:.0f}"
            )
        for ahead_s in (_AHEAD_S, 2 * _AHEAD_S):
            ahead = [max(2, math.ceil(ahead_s / seconds)) for seconds in done_s]
            if (taken_s := self._beside(work, company, ahead)) is not None:
                return taken_s
        raise RuntimeError("the copies beside it ended first: what was measured is neither")

    def _beside(self, work: Work, company: Sequence[Work], ahead: Sequence[int]) -> float | None:
        """None where company paused. `ahead` says how many of each are started in advance."""
        torch.cuda.synchronize(self.device)
        streams = self._side_streams(len(company))
        repeated = [
            Repeated(partial(_started, each, stream), count)
            for each, stream, count in zip(company, streams, ahead, strict=True)
        ]
        begin, end = _event(), _event()
        for _ in range(max(ahead)):
            _go_on(repeated)
        _sleep()
        begin.record()
        work()
        end.record()
        while not end.query():
            _go_on(repeated)
        never_paused = all(each.never_paused for each in repeated)
        torch.cuda.synchronize(self.device)
        return float(begin.elapsed_time(end)) / 1e3 if never_paused else None

    def pinned(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)

    def pin(self, memory: memoryview) -> bool:
        return PINNED.pin(memory, self.device)

    def capture(self) -> Capture:
        return GraphCapture(self.device)

    def tier_copies(self, pages: PagedTensors, layout: BlockLayout) -> BlockCopies:
        return fastest_copies(pages, layout, KernelCopies(pages, layout.block_tokens))

    def free_bytes(self) -> int:
        self.clear()
        return torch.cuda.mem_get_info(self.device)[0]

    def clear(self) -> None:
        gc.collect()
        torch.cuda.empty_cache()

    def facts(self) -> dict[str, Any]:
        properties = torch.cuda.get_device_properties(self.device)
        return {
            "name": properties.name,
            "memory_bytes": properties.total_memory,
            "multiprocessors": properties.multi_processor_count,
            "capability": f"{properties.major}.{properties.minor}",
            "cuda": torch.version.cuda,
            **driver_facts(str(getattr(properties, "uuid", ""))),
        }

    def _head_start(self) -> None:
        torch.cuda.synchronize(self.device)
        _sleep()

    def _side_streams(self, count: int) -> list[Any]:
        new: Callable[..., Any] = torch.cuda.Stream
        while len(self._streams) < count:
            self._streams.append(new(self.device))
        return self._streams[:count]


def cuda_card(name: str) -> CudaCard:
    """`cuda` or `cuda:N`. Raises SettingsError for one that is not here."""
    device = torch_device(name)
    if device.type != "cuda":
        raise SettingsError(f"device {name}: this measures GPUs; give cuda, or cuda:1")
    return CudaCard(device)


def _started(work: Work, stream: Any) -> Any:
    with torch.cuda.stream(stream):
        work()
    return stream.record_event()


def _go_on(repeated: Sequence[Repeated]) -> None:
    for each in repeated:
        each.go_on()


def _sleep() -> None:
    sleep: Callable[[int], None] = torch.cuda._sleep
    sleep(_HEAD_START_CYCLES)


def _event() -> Any:
    event: Callable[..., Any] = torch.cuda.Event
    return event(enable_timing=True)
