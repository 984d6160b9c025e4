"""Pages copied by CUDA kernels, in the emulator where there is no device, beside plain `Pages`."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from kvstore.connectors.convert import Pages
from kvstore.connectors.device_pages import pages_of
from kvstore.connectors.kernel_pages import CopyingStream, KernelPages
from kvstore.connectors.page_layout import PageLayout
from kvstore.errors import LayoutError
from kvstore.kernels.pinned_memory import PINNED, PinnedMemory
from kvstore.layout import Shard
from kvstore.tiers.arena import Arena
from kvstore.tiers.hbm_copies import CopyEvent
from tests.connectors.pages import random_tensors
from tests.kernels.emulator import EmulatedRuntime
from tests.tiers.emulated_copies import Later, at_once

# Of vLLM on GPUs, the six that it knows; and others.
ORDERS = ("LBHNKD", "LBNHKD", "LHBNKD", "BLHNKD", "BLNHKD", "BHLNKD", "BNHD", "KBNHD", "HLKBND")
SIZES = ((16, 16), (16, 32), (32, 16), (16, 24), (48, 32))  # tokens of a page, and of a block

Make = Callable[[PageLayout, list[Tensor]], KernelPages]


class LateStream:
    """A stream that does nothing before it must, and notes after what it was to do it."""

    marks = 0
    after: ClassVar[list[object]] = []

    def __init__(self, device: torch.device) -> None:
        self._stream = Later()

    def computed(self) -> object:
        LateStream.marks += 1
        return LateStream.marks

    def run(self, copy: Callable[[], None], after: object = None) -> CopyEvent:
        self.after.append(after)
        return self._stream.run(copy)


@pytest.fixture(params=["emulated", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device("cuda:0" if request.param == "cuda" else "cpu")


@pytest.fixture
def make(device: torch.device, pytestconfig: pytest.Config) -> Make:
    if device.type == "cuda":
        return lambda layout, tensors: KernelPages(layout, tensors)
    return emulated(pytestconfig)


def emulated(pytestconfig: pytest.Config) -> Make:
    if shutil.which("g++") is None:
        pytest.skip("kernels are emulated with g++, which is not there")
    assert pytestconfig.cache is not None
    runtime = EmulatedRuntime(Path(pytestconfig.cache.mkdir("emulator")))
    pinned = PinnedMemory(lambda start, nbytes, device: 0, lambda start, device: 0, at_once)
    return lambda layout, tensors: KernelPages(
        layout, tensors, runtime=runtime, stream=LateStream, pinned=pinned
    )


@pytest.fixture(params=["pinned", "staged"])
def cut(
    request: pytest.FixtureRequest, device: torch.device
) -> Iterator[Callable[[int, int], list[memoryview]]]:
    """Makes so many buffers of so many bytes, in an arena or anywhere."""
    arena = Arena(1 << 20)
    if device.type == "cuda":
        assert PINNED.pin(arena.buffer, device)
    whole = arena.buffer if request.param == "pinned" else memoryview(bytearray(1 << 20))
    yield lambda count, nbytes: [whole[i * nbytes : (i + 1) * nbytes] for i in range(count)]
    whole.release()
    arena.close()


def page_layout(order: str, page_tokens: int, heads: Shard | None = None) -> PageLayout:
    return PageLayout(order, 12, page_tokens, 3, 4, 8, "bfloat16", heads=heads)


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    pairs = zip(one, other, strict=True)
    return all(torch.equal(a.view(torch.uint8).cpu(), b.view(torch.uint8).cpu()) for a, b in pairs)


def test_a_copy_comes_after_what_its_pages_follow_and_no_later(pytestconfig: pytest.Config) -> None:
    make: Make = emulated(pytestconfig)
    layout = page_layout("LBHNKD", 16)
    pages = make(layout, random_tensors(layout))
    view = [memoryview(bytearray(layout.block_layout(16).block_bytes))]
    LateStream.after.clear()
    LateStream.marks = 0
    early, late = pages.follow(), pages.follow()
    for each in (early, late, early, pages):
        each.copy_out([3], 0, view, 16)
        each.copy_in([3], 0, view, 16, layout.held, range(16))
    assert LateStream.after == [1, 1, 2, 2, 1, 1, None, None]


@pytest.mark.parametrize("heads", [None, Shard(2, 2)], ids=["all", "half"])
@pytest.mark.parametrize(("page_tokens", "block_tokens"), SIZES)
@pytest.mark.parametrize("order", ORDERS)
def test_what_kernels_read_is_what_the_cpu_reads(
    make: Make,
    cut: Callable[[int, int], list[memoryview]],
    device: torch.device,
    order: str,
    page_tokens: int,
    block_tokens: int,
    heads: Shard | None,
) -> None:
    layout = page_layout(order, page_tokens, heads)
    tensors = random_tensors(layout)
    nbytes = layout.block_layout(block_tokens).head_bytes * layout.held.heads
    table, first = [7, 0, 11, 3, 2, 9, 5], 16
    views, right = cut(3, nbytes), [memoryview(bytearray(nbytes)) for _ in range(3)]
    make(layout, [tensor.to(device) for tensor in tensors]).copy_out(
        table, first, views, block_tokens
    )
    Pages(layout, tensors).copy_out(table, first, right, block_tokens)
    assert [bytes(view) for view in views] == [bytes(view) for view in right]


@pytest.mark.parametrize("wanted", [range(0, 200), range(21, 60), range(40, 41), range(0)])
@pytest.mark.parametrize("shard", [Shard(0, 4), Shard(2, 2), Shard(3, 1), Shard(0, 2)])
@pytest.mark.parametrize("heads", [None, Shard(2, 2)], ids=["all", "half"])
@pytest.mark.parametrize("order", ["LBNHKD", "BHLNKD", "BNHD"])
def test_kernels_write_what_is_wanted_and_nothing_else(
    make: Make,
    cut: Callable[[int, int], list[memoryview]],
    device: torch.device,
    order: str,
    heads: Shard | None,
    shard: Shard,
    wanted: range,
) -> None:
    layout = page_layout(order, 16, heads)
    views = cut(2, layout.block_layout(24).head_bytes * shard.heads)
    for number, view in enumerate(views):
        torch.manual_seed(number)
        view[:] = torch.randint(0, 256, (len(view),), dtype=torch.uint8).numpy().data
    table = [7, 0, 11, 3, 2, 9]
    right, tensors = random_tensors(layout), [t.to(device) for t in random_tensors(layout)]
    readable = [view.toreadonly() for view in views]
    make(layout, tensors).copy_in(table, 16, readable, 24, shard, wanted)
    Pages(layout, right).copy_in(table, 16, readable, 24, shard, wanted)
    assert same(tensors, right)


def test_any_number_of_threads_may_copy(make: Make, device: torch.device) -> None:
    layout = page_layout("LBHNKD", 16)
    tensors = [tensor.to(device) for tensor in random_tensors(layout)]
    pages, plain = make(layout, tensors), Pages(layout, random_tensors(layout))
    nbytes = layout.block_layout(16).block_bytes
    wrong = []

    def copy(page: int) -> None:
        view, right = memoryview(bytearray(nbytes)), memoryview(bytearray(nbytes))
        for _ in range(10):
            pages.copy_out([page], 0, [view], 16)
            plain.copy_out([page], 0, [right], 16)
            if view != right:
                wrong.append(page)
            pages.copy_in([page], 0, [right], 16, layout.held, range(16))

    threads = [Thread(target=copy, args=(page,)) for page in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert same(tensors, random_tensors(layout))


def test_tables_that_cannot_be_are_refused(make: Make, device: torch.device) -> None:
    layout = page_layout("LBHNKD", 16)
    pages = make(layout, [tensor.to(device) for tensor in random_tensors(layout)])
    view = [memoryview(bytearray(layout.block_layout(16).block_bytes))]
    with pytest.raises(LayoutError, match="outside"):
        pages.copy_out([12], 0, view, 16)
    with pytest.raises(LayoutError, match="outside"):
        pages.copy_in([-1], 0, view, 16, layout.held, range(16))
    with pytest.raises(LayoutError, match="bytes"):
        pages.copy_out([1], 0, [view[0][1:]], 16)


@contextmanager
def busy_stream() -> Iterator[None]:
    """Another current stream, on which something takes a tenth of a second first."""
    stream: Callable[..., Any] = torch.cuda.Stream
    sleep: Callable[[int], None] = torch.cuda._sleep
    with torch.cuda.stream(stream()):
        sleep(200_000_000)
        yield


@pytest.mark.gpu
def test_a_copy_follows_what_another_stream_computes() -> None:
    """A thread with a stream of its own, as vLLM's, and copies in a thread that has none."""
    layout = page_layout("LBHNKD", 16)
    (tensor,) = (t.cuda() for t in random_tensors(layout))
    pages = pages_of(layout, [tensor])
    assert isinstance(pages, KernelPages)
    view = memoryview(bytearray(layout.block_layout(16).block_bytes))
    with busy_stream():
        tensor.view(torch.uint8).fill_(7)
        followed = pages.follow()
    thread = Thread(target=followed.copy_out, args=([3], 0, [view], 16))
    thread.start()
    thread.join()
    assert bytes(view) == bytes([7]) * len(view)


@pytest.mark.gpu
def test_a_copy_after_nothing_said_waits_for_all() -> None:
    value = torch.zeros(1, device="cuda")
    seen = torch.empty(1, pin_memory=True)
    with busy_stream():
        value.fill_(3)

    def copy() -> None:
        seen.copy_(value, non_blocking=True)

    CopyingStream(value.device).run(copy, None).wait()
    assert seen.item() == 3
