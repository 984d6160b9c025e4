"""Copies of the HBM tier by the CUDA kernels, in the emulator where there is no device."""

from __future__ import annotations

import ctypes
import gc
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from threading import enumerate as enumerate_threads
from typing import Any

import pytest
import torch
from torch import Tensor

from kvstore.errors import SettingsError
from kvstore.kernels import reference
from kvstore.kernels.block_copy_cuda import KernelCopies
from kvstore.kernels.paged_tensors import paged
from kvstore.kernels.pinned_memory import PINNED, PinnedMemory
from kvstore.layout import BlockLayout
from kvstore.tiers.arena import Arena
from kvstore.tiers.hbm_cuda import CudaCopies, CudaStream
from tests.kernels.emulator import EmulatedRuntime
from tests.tiers.emulated_copies import Later, at_once, emulated_copies

LAYOUT = BlockLayout(layers=3, kv_heads=2, head_dim=8, block_tokens=4, dtype="bfloat16")
BLOCKS = 9
CPU = torch.device("cpu")


class Driver:
    """Registrations, as CUDA would have them; notes whether memory was there to the end."""

    def __init__(self, error: int = 0) -> None:
        self.error = error
        self.registered: dict[int, int] = {}
        self.ended_mapped: list[bool] = []
        self.devices: list[torch.device] = []  # of all calls

    def register(self, start: int, nbytes: int, device: torch.device) -> int:
        assert start not in self.registered
        self.devices.append(device)
        if not self.error:
            self.registered[start] = nbytes
        return self.error

    def unregister(self, start: int, device: torch.device) -> int:
        del self.registered[start]
        self.devices.append(device)
        self.ended_mapped.append(_is_mapped(start))
        return 0


def _is_mapped(address: int) -> bool:
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, stop = (int(bound, 16) for bound in line.split()[0].split("-"))
        if start <= address < stop:
            return True
    return False


@pytest.fixture(params=["emulated", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device("cuda:0" if request.param == "cuda" else "cpu")


@pytest.fixture
def kv(device: torch.device) -> Tensor:
    heads, layers, pair, tokens, head_dim = LAYOUT.shape
    return torch.randn(heads, layers, pair, BLOCKS * tokens, head_dim).bfloat16().to(device)


@pytest.fixture
def make(
    device: torch.device, kv: Tensor, pytestconfig: pytest.Config
) -> Callable[[PinnedMemory], CudaCopies]:
    def copies(pinned: PinnedMemory) -> CudaCopies:
        if device.type == "cuda":
            pages = paged(kv, LAYOUT.block_tokens)
            streams = CudaStream(device), CudaStream(device)
            kernel = KernelCopies(pages, LAYOUT.block_tokens)
            return CudaCopies(pages, LAYOUT, kernel, kernel, PINNED, *streams)
        if shutil.which("g++") is None:
            pytest.skip("kernels are emulated with g++, which is not there")
        assert pytestconfig.cache is not None
        runtime = EmulatedRuntime(Path(pytestconfig.cache.mkdir("emulator")))
        return emulated_copies(kv, LAYOUT, runtime, pinned, Later)

    return copies


@pytest.fixture
def arena() -> Iterator[Arena]:
    arena = Arena(1 << 20)
    yield arena
    arena.close()


def views_of(arena: Arena, count: int) -> list[memoryview]:
    size = LAYOUT.block_bytes
    return [arena.buffer[start : start + size] for start in range(4096, 4096 + count * size, size)]


@pytest.mark.parametrize("error", [0, 2])
def test_blocks_go_out_and_come_in(
    make: Callable[[PinnedMemory], CudaCopies], kv: Tensor, arena: Arena, error: int
) -> None:
    """Straight to pinned memory, and by way of other memory where it cannot be pinned."""
    driver = Driver(error)
    copies = make(PinnedMemory(driver.register, driver.unregister, at_once))
    views = views_of(arena, 3)
    gone = copies.copy_out([7, 0, 4], views)
    if kv.device.type == "cpu":  # there a copy is made when it is waited for
        assert not gone.done()
    gone.wait()
    assert gone.done()
    before = kv.cpu().clone()
    assert [bytes(view) for view in views] == reference.copy_out(before, [7, 0, 4], 4)
    event = copies.copy_in([1, 2, 8], [view.toreadonly() for view in views])
    if kv.device.type == "cpu":
        assert not event.done()
    event.wait()
    after = kv.cpu()
    assert reference.copy_out(after, [1, 2, 8], 4) == [bytes(view) for view in views]
    for block in (0, 3, 4, 5, 6, 7):
        place = slice(block * 4, block * 4 + 4)
        assert torch.equal(after[:, :, :, place], before[:, :, :, place])


@pytest.mark.parametrize("error", [0, 2])
def test_layers_come_one_after_another(
    make: Callable[[PinnedMemory], CudaCopies], kv: Tensor, arena: Arena, error: int
) -> None:
    driver = Driver(error)
    copies = make(PinnedMemory(driver.register, driver.unregister, at_once))
    views = views_of(arena, 2)
    copies.copy_out([5, 3], views).wait()
    before = kv.cpu().clone()
    events = copies.copy_in_by_layer([0, 1], views)
    assert len(events) == LAYOUT.layers
    for layer, event in enumerate(events):
        event.precede_compute()
        arrived = kv.cpu()
        source = torch.cat([before[:, : layer + 1, :, b * 4 : b * 4 + 4] for b in (5, 3)], 2 + 1)
        assert torch.equal(arrived[:, : layer + 1, :, :8], source)
        if kv.device.type == "cpu":  # there it comes when it is waited for
            assert torch.equal(arrived[:, layer + 1 :], before[:, layer + 1 :])
    assert all(event.done() for event in events)
    assert reference.copy_out(kv.cpu(), [0, 1], 4) == [bytes(view) for view in views]


def test_blocks_that_are_too_large_for_the_kernels(kv: Tensor) -> None:
    layout = BlockLayout(layers=3, kv_heads=2, head_dim=8, block_tokens=257, dtype="bfloat16")
    with pytest.raises(SettingsError, match="block_tokens is 257; on a CUDA device it may be 256"):
        CudaCopies.over(kv, layout)


def test_an_arena_is_pinned_once_and_let_go_before_it_is_unmapped() -> None:
    driver = Driver()
    pinned = PinnedMemory(driver.register, driver.unregister, at_once)
    arena, other = Arena(3 << 20), Arena(1 << 20)
    start = ctypes.addressof(ctypes.c_char.from_buffer(arena.buffer))
    for _ in range(3):
        assert pinned.holds([*views_of(arena, 2), arena.buffer[8192:].toreadonly()], CPU)
    assert driver.registered == {start: 3 << 20}
    assert pinned.holds([*views_of(arena, 1), *views_of(other, 1)], CPU)
    assert len(driver.registered) == 2
    view = arena.buffer[5:10]
    arena.close()
    assert start in driver.registered, "a view is still there"
    del view
    gc.collect()
    assert start not in driver.registered
    assert driver.ended_mapped == [True]
    other.close()
    assert not driver.registered


def test_memory_that_is_gone_is_forgotten() -> None:
    """A new object may have the place, and the id, of one that is gone."""
    driver = Driver()
    pinned = PinnedMemory(driver.register, driver.unregister, at_once)
    for _ in range(20):
        arena = Arena(1 << 20)
        assert pinned.holds(views_of(arena, 1), CPU)
        assert len(driver.registered) == 1
        arena.close()
    assert driver.ended_mapped == [True] * 20


def test_other_memory_is_not_pinned() -> None:
    driver = Driver()
    pinned = PinnedMemory(driver.register, driver.unregister, at_once)
    assert not pinned.holds([memoryview(bytearray(100))], CPU)
    assert pinned.holds([], CPU)
    assert not driver.registered


def test_memory_that_somebody_else_has_pinned_is_not_counted_on() -> None:
    """They may end it while a copy is on its way, and it is theirs to end."""
    driver, arena = Driver(error=712), Arena(1 << 20)
    pinned = PinnedMemory(driver.register, driver.unregister, at_once)
    assert not pinned.holds(views_of(arena, 2), CPU)
    arena.close()
    gc.collect()
    assert driver.ended_mapped == []


def test_engines_that_start_at_once_register_once() -> None:
    """CUDA pins without the GIL, so another thread comes while it does; and ends it once."""
    driver, arena, results = Driver(), Arena(1 << 20), []

    def register(start: int, nbytes: int, device: torch.device) -> int:
        if not second.ident:  # only when it is wrong does it come here again
            second.start()
            second.join(0.2)  # it would be here by now, and gets on afterwards if it waits
        return driver.register(start, nbytes, device)

    def ask() -> None:
        results.append(pinned.pin(arena.buffer, CPU))

    pinned = PinnedMemory(register, driver.unregister, at_once)
    second = Thread(target=ask)
    ask()
    second.join()
    assert results == [True, True]
    assert len(driver.registered) == 1
    arena.close()
    gc.collect()
    assert driver.ended_mapped == [True]


def test_nobody_waits_for_memory_that_comes_later(
    make: Callable[[PinnedMemory], CudaCopies], kv: Tensor, arena: Arena
) -> None:
    """The arena of a daemon that was started again: blocks go by way of other memory for now."""
    driver, works = Driver(), list[Callable[[], object]]()
    pinned = PinnedMemory(driver.register, driver.unregister, works.append)
    copies, views = make(pinned), views_of(arena, 3)
    for _ in range(2):
        copies.copy_out([7, 0, 4], views).wait()
        assert [bytes(view) for view in views] == reference.copy_out(kv.cpu(), [7, 0, 4], 4)
        assert not driver.registered
    if kv.device.type == "cpu":  # on a device it is the process's own
        (work,) = works
        work()
        assert pinned.holds(views, CPU)
        assert list(driver.registered.values()) == [1 << 20]


def test_memory_is_not_unmapped_while_it_is_being_pinned() -> None:
    driver, works = Driver(), list[Callable[[], object]]()
    pinned = PinnedMemory(driver.register, driver.unregister, works.append)
    arena = Arena(1 << 20)
    assert not pinned.holds(views_of(arena, 1), CPU)
    arena.close()
    gc.collect()
    works.pop()()
    assert driver.ended_mapped == [True]
    assert not driver.registered


def test_memory_is_pinned_and_let_go_on_the_device_that_asked() -> None:
    """Any other would get a context, of some hundred MiB, for it."""
    second = torch.device("cuda:1")
    driver = Driver()
    pinned = PinnedMemory(driver.register, driver.unregister, at_once)
    at_start, later = Arena(1 << 20), Arena(1 << 20)
    assert pinned.pin(at_start.buffer, second)
    assert pinned.holds([later.buffer], second)
    at_start.close()
    later.close()
    assert driver.devices == [second] * 4


def test_cuda_is_asked_on_that_device(monkeypatch: pytest.MonkeyPatch) -> None:
    arena = Arena(1 << 20)
    runtime = pytest.importorskip("cupy").cuda.runtime
    current = [torch.device("cuda:0")]
    calls: list[tuple[str, torch.device]] = []

    @contextmanager
    def on(device: torch.device) -> Iterator[None]:
        current.append(device)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "device", on)
    for name in ("hostRegister", "hostUnregister"):
        monkeypatch.setattr(
            runtime, name, lambda *args, name=name: calls.append((name, current[-1]))
        )
    second = torch.device("cuda:1")
    assert PinnedMemory().pin(arena.buffer, second)
    arena.close()
    gc.collect()
    assert calls == [("hostRegister", second), ("hostUnregister", second)]


def test_pinning_aside() -> None:
    driver, arena = Driver(), Arena(1 << 20)
    pinned = PinnedMemory(driver.register, driver.unregister)
    pinned.holds(views_of(arena, 1), CPU)
    for thread in enumerate_threads():
        if thread.name == "kvstore-pin":
            thread.join()
    assert pinned.holds(views_of(arena, 1), CPU)
    arena.close()
    gc.collect()
    assert driver.ended_mapped == [True]


def test_what_is_refused_is_said_once(caplog: pytest.LogCaptureFixture, arena: Arena) -> None:
    driver = Driver(error=2)
    pinned = PinnedMemory(driver.register, driver.unregister, at_once)
    for _ in range(3):
        assert not pinned.holds(views_of(arena, 2), CPU)
    assert len(caplog.records) == 1
    assert "1048576 bytes" in caplog.text


@pytest.mark.gpu
def test_what_a_failed_copy_has_started_is_over_when_it_raises() -> None:
    stream, target = CudaStream(torch.device("cuda:0")), torch.zeros(8, device="cuda")
    event: Callable[..., Any] = torch.cuda.Event
    end = event()

    def fail() -> None:
        torch.cuda._sleep(50_000_000)  # type: ignore[no-untyped-call]
        target.fill_(1)
        end.record()
        raise MemoryError

    with pytest.raises(MemoryError):
        stream.run(fail)
    assert end.query()
