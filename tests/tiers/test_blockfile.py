"""Drivers and block file: every byte arrives where it belongs, and errors are told one by one."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import random
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvstore.tiers.blockfile import MERGE_BYTES, Block, BlockFile
from kvstore.tiers.driver import Driver, Op, Request, address, open_driver
from kvstore.tiers.uring import DEPTH, UringDriver
from tests.tiers.subjects import content, o_direct_refused

PAGE = 4096


def drivers_here() -> list[str]:
    """io_uring is tested wherever the kernel lets us."""
    try:
        UringDriver().close()
    except OSError:
        return ["threads"]
    return ["uring", "threads"]


@pytest.fixture(params=drivers_here())
def driver(request: pytest.FixtureRequest) -> Iterator[Driver]:
    opened = open_driver(request.param)
    assert opened.name == request.param
    yield opened
    opened.close()


@pytest.fixture(params=["direct", "buffered"])
def file(request: pytest.FixtureRequest, driver: Driver, tmp_path: Path) -> Iterator[BlockFile]:
    if request.param == "direct":
        opened = BlockFile(tmp_path / "slab", driver)
    else:
        with o_direct_refused():
            opened = BlockFile(tmp_path / "slab", driver)
        assert not opened.direct
    opened.resize(4 << 20)
    yield opened
    opened.close()


def request(offset: int, buffer: memoryview) -> Request:
    return Request(offset, [buffer], [address(buffer)])


def move(call: object, blocks: list[Block]) -> dict[int, int]:
    """Runs `file.read` or `file.write`; the outcome of each block, told exactly once."""
    told: dict[int, int] = {}

    def done(number: int, error: int) -> None:
        assert number not in told
        told[number] = error

    assert callable(call)
    call(blocks, done)
    assert sorted(told) == list(range(len(blocks)))
    return told


def test_a_ring_that_cannot_be_mapped_leaves_no_file_open() -> None:
    """The kernel gives the ring the last file descriptor, and none to map it with."""
    last = os.dup(0)
    os.close(last)
    before = os.listdir("/proc/self/fd")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (last + 1, hard))
    try:
        with pytest.raises(OSError, match=r".") as refused:
            UringDriver()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert refused.value.errno in (errno.EMFILE, errno.EPERM, errno.ENOSYS)
    assert os.listdir("/proc/self/fd") == before


def aligned(nbytes: int) -> memoryview:
    return memoryview(mmap.mmap(-1, nbytes))


def test_neighbours_strangers_and_odd_ones(file: BlockFile, tmp_path: Path) -> None:
    """More blocks than fit into a ring, in random order, some merged, some through a bounce."""
    chance = random.Random(1)
    expected: dict[int, bytes] = {}
    blocks = []
    offset = 0
    for number in range(3 * DEPTH):
        nbytes = chance.choice([PAGE, 2 * PAGE, 5000, 1, 3 * PAGE])
        expected[offset] = content(number, nbytes)
        buffer = aligned(nbytes) if not nbytes % PAGE else memoryview(bytearray(nbytes))
        buffer[:] = expected[offset]
        blocks.append(Block(offset, buffer))
        offset += -(-nbytes // PAGE) * PAGE * chance.choice([1, 1, 1, 2])
    assert offset < file.size_bytes
    chance.shuffle(blocks)
    assert set(move(file.write, blocks).values()) == {0}
    on_disk = (tmp_path / "slab").read_bytes()
    for start, data in expected.items():
        assert on_disk[start : start + len(data)] == data
    chance.shuffle(blocks)
    again = [Block(b.offset, aligned(b.buffer.nbytes)) for b in blocks]
    assert set(move(file.read, again).values()) == {0}
    assert all(bytes(b.buffer) == expected[b.offset] for b in again)


def test_blocks_larger_than_a_merge(file: BlockFile) -> None:
    nbytes = MERGE_BYTES + PAGE
    blocks = [Block(i * nbytes, aligned(nbytes)) for i in range(2)]
    for i, block in enumerate(blocks):
        block.buffer[:] = content(i, nbytes)
    move(file.write, blocks)
    again = [Block(b.offset, aligned(nbytes)) for b in reversed(blocks)]
    assert move(file.read, again) == {0: 0, 1: 0}
    assert bytes(again[1].buffer) == content(0, nbytes)


def test_read_only_buffers_are_written_from(file: BlockFile) -> None:
    assert move(file.write, [Block(PAGE, memoryview(content(1, 9000)))]) == {0: 0}
    back = memoryview(bytearray(9000))
    assert move(file.read, [Block(PAGE, back)]) == {0: 0}
    assert back == content(1, 9000)


def test_the_end_of_the_file_costs_only_what_lies_beyond(file: BlockFile, tmp_path: Path) -> None:
    blocks = [Block(i * PAGE, aligned(PAGE)) for i in range(8)]
    for i, block in enumerate(blocks):
        block.buffer[:] = content(i, PAGE)
    move(file.write, blocks)
    os.truncate(tmp_path / "slab", 5 * PAGE)
    again = [Block(b.offset, aligned(PAGE)) for b in blocks]
    told = move(file.read, again)
    assert [told[i] for i in range(5)] == [0] * 5
    assert all(told[i] for i in range(5, 8))
    assert all(bytes(again[i].buffer) == content(i, PAGE) for i in range(5))


def test_an_error_of_the_medium_is_told_for_each_block(file: BlockFile) -> None:
    """/dev/full is a device whose every write fails, as a full disk does."""
    full = os.open("/dev/full", os.O_RDWR)
    os.dup2(full, file._fd)
    os.close(full)
    told = move(file.write, [Block(i * PAGE, aligned(PAGE)) for i in range(70)])
    assert set(told.values()) == {errno.ENOSPC}


def test_resize_refused_changes_nothing(file: BlockFile) -> None:
    with pytest.raises(OSError, match=r".") as caught:
        file.resize(1 << 55)
    assert caught.value.errno in (errno.ENOSPC, errno.EFBIG)
    assert file.size_bytes == 4 << 20
    file.resize(1 << 20)
    assert file.size_bytes == 1 << 20


def test_an_error_in_done_waits_for_the_others(driver: Driver, tmp_path: Path) -> None:
    """Buffers may not be freed while the kernel still writes to them."""
    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    os.truncate(fd, DEPTH * 4 * PAGE)
    buffers = [memoryview(bytearray(PAGE)) for _ in range(4 * DEPTH)]
    requests = [request(i * PAGE, buffer) for i, buffer in enumerate(buffers)]

    def raises(number: int, result: int) -> None:
        raise RuntimeError("of the caller's own")

    with pytest.raises(RuntimeError, match="own"):
        driver.run(Op.READ, fd, requests, raises)
    told: list[tuple[int, int]] = []
    driver.run(Op.READ, fd, requests, lambda number, result: told.append((number, result)))
    assert sorted(told) == [(i, PAGE) for i in range(4 * DEPTH)]
    os.close(fd)


def test_one_bad_request_does_not_hold_up_the_others(driver: Driver, tmp_path: Path) -> None:
    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    os.truncate(fd, 10 * PAGE)
    requests = [request(i * PAGE, memoryview(bytearray(PAGE))) for i in range(10)]
    requests[4] = requests[4]._replace(offset=-PAGE if driver.name == "threads" else 1 << 63)
    told: dict[int, int] = {}
    driver.run(Op.READ, fd, requests, told.__setitem__)
    assert told.pop(4) == -errno.EINVAL
    assert told == {i: PAGE for i in range(10) if i != 4}
    os.close(fd)


def test_nothing_to_do(driver: Driver, file: BlockFile) -> None:
    assert move(file.read, []) == {}
    driver.run(Op.READ, 0, [], lambda number, result: pytest.fail("told of nothing"))


REFUSED = """
import asyncio, ctypes, logging, sys
from pathlib import Path
libc = ctypes.CDLL(None, use_errno=True)
class Step(ctypes.Structure):
    _fields_ = [("code", ctypes.c_uint16), ("jt", ctypes.c_uint8), ("jf", ctypes.c_uint8),
                ("k", ctypes.c_uint32)]
class Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_uint16), ("steps", ctypes.POINTER(Step))]
# Load the system call's number; io_uring_setup gets EPERM, everything else goes on.
steps = (Step * 4)(Step(0x20, 0, 0, 0), Step(0x15, 0, 1, 425), Step(0x06, 0, 0, 0x00050001),
                   Step(0x06, 0, 0, 0x7FFF0000))
assert libc.prctl(38, 1, 0, 0, 0) == 0
assert libc.prctl(22, 2, ctypes.byref(Program(4, steps)), 0, 0) == 0

logging.basicConfig(level=logging.INFO)
from kvstore.errors import SettingsError
from kvstore.tiers.nvme import NvmeTier
from tests.tiers.subjects import content, get, item
async def main():
    tier = NvmeTier(Path(sys.argv[1]), 4 << 20)
    assert not tier.stats()["io_uring"]
    await tier.write([item(n) for n in range(20)])
    for n in range(20):
        assert (await get(tier, n))[1] == content(n, 8192)
    await tier.close()
    try:
        NvmeTier(Path(sys.argv[1]), 4 << 20, driver="uring")
    except SettingsError as error:
        print(error)
asyncio.run(main())
"""


def test_where_io_uring_is_refused_threads_do_the_work(tmp_path: Path) -> None:
    """The kernel itself refuses: a seccomp filter, as container runtimes install it."""
    if ctypes.sizeof(ctypes.c_void_p) != 8:
        pytest.fail("the filter above is written for 64-bit kernels")
    child = subprocess.run(
        [sys.executable, "-c", REFUSED, str(tmp_path / "nvme")],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=Path(__file__).parents[2],
        check=False,
    )
    assert child.returncode == 0, child.stderr
    assert "io_uring is refused" in child.stderr
    assert "io_uring is refused on this machine" in child.stdout


def test_a_file_system_without_o_direct_is_told_of_once(
    driver: Driver, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with o_direct_refused():
        file = BlockFile(tmp_path / "slab", driver)
    file.resize(1 << 20)
    for _ in range(3):
        move(file.write, [Block(0, aligned(PAGE))])
    file.close()
    file.close()
    assert caplog.text.count("no O_DIRECT") == 1
