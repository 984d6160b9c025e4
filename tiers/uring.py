"""The fast driver: io_uring, through the system calls themselves.

No binding is needed: a batch is one vector assignment into the submission
queue, and one system call (which releases the GIL) submits it and waits. The
structures are those of linux/io_uring.h; system call numbers are the same on
every architecture. Why this and not a package: docs/adr/0010.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import threading
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from kvstore.tiers.driver import Done, Op, Request

DEPTH = 64  # requests in flight per batch; the drive's queue is full well before

_SETUP, _ENTER = 425, 426  # system calls
_OPCODES = {Op.READ: 1, Op.WRITE: 2}  # IORING_OP_READV, IORING_OP_WRITEV
_SQES_OFFSET = 0x10000000  # where mmap finds the submission entries
_ENTER_GETEVENTS = 1
_FEAT_SINGLE_MMAP = 1
# SUBMIT_ALL: an entry that fails does not hold back those behind it. SINGLE_ISSUER
# with DEFER_TASKRUN (Linux 6.1): completions are posted by our own thread within
# `enter` and at no other time, so that neither queue needs memory barriers.
_SETUP_FLAGS = 1 << 7 | 1 << 12 | 1 << 13

_SQE = np.dtype(
    [
        ("opcode", "u1"),
        ("flags", "u1"),
        ("ioprio", "u2"),
        ("fd", "i4"),
        ("offset", "u8"),
        ("iovecs", "u8"),
        ("iovec_count", "u4"),
        ("rw_flags", "u4"),
        ("user_data", "u8"),
        ("unused", "u8", (3,)),
    ]
)
_CQE = np.dtype([("user_data", "u8"), ("result", "i4"), ("flags", "u4")])
_IOVEC = np.dtype([("base", "u8"), ("length", "u8")])


class _SubmissionOffsets(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_uint32)
        for name in ("head", "tail", "mask", "entries", "flags", "dropped", "array", "unused")
    ] + [("address", ctypes.c_uint64)]


class _CompletionOffsets(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_uint32)
        for name in ("head", "tail", "mask", "entries", "overflow", "cqes", "flags", "unused")
    ] + [("address", ctypes.c_uint64)]


class _Params(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_uint32) for name in ("sq_entries", "cq_entries", "flags")),
        *((name, ctypes.c_uint32) for name in ("thread_cpu", "thread_idle", "features", "wq_fd")),
        ("unused", ctypes.c_uint32 * 3),
        ("sq", _SubmissionOffsets),
        ("cq", _CompletionOffsets),
    ]


_libc = ctypes.CDLL(None, use_errno=True)
_syscall = _libc.syscall
_syscall.restype = ctypes.c_long
_syscall.argtypes = [ctypes.c_long] * 7


class UringDriver:
    """See `Driver`. One ring for each thread that calls `run`."""

    name = "uring"

    def __init__(self) -> None:
        """Raises OSError where the kernel refuses: too old, seccomp, io_uring_disabled."""
        self._rings: list[_Ring] = []
        self._own = threading.local()
        _Ring().close()

    def run(self, op: Op, fd: int, requests: Sequence[Request], done: Done) -> None:
        ring: _Ring | None = getattr(self._own, "ring", None)
        if ring is None:
            ring = self._own.ring = _Ring()
            self._rings.append(ring)
        ring.run(op, fd, requests, done)

    def close(self) -> None:
        while self._rings:
            self._rings.pop().close()


class _Ring:
    """One submission and one completion queue; all but `close` by the thread that made it."""

    def __init__(self) -> None:
        params = _Params(flags=_SETUP_FLAGS)
        self._fd = _call(_SETUP, DEPTH, ctypes.addressof(params))
        try:
            self._map(params)
        except BaseException:
            os.close(self._fd)
            raise

    def _map(self, params: _Params) -> None:
        if not params.features & _FEAT_SINGLE_MMAP:
            raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
        sq, cq = params.sq, params.cq
        nbytes = max(sq.array + 4 * params.sq_entries, cq.cqes + _CQE.itemsize * params.cq_entries)
        self._queues = mmap.mmap(self._fd, nbytes)
        self._entries = mmap.mmap(self._fd, _SQE.itemsize * params.sq_entries, offset=_SQES_OFFSET)
        self._sqes = np.frombuffer(self._entries, _SQE)
        self._cqes = np.frombuffer(self._queues, _CQE, params.cq_entries, cq.cqes)
        self._sq_head, self._sq_tail = self._counter(sq.head), self._counter(sq.tail)
        self._cq_head, self._cq_tail = self._counter(cq.head), self._counter(cq.tail)
        order = np.frombuffer(self._queues, np.uint32, params.sq_entries, sq.array)
        order[:] = np.arange(params.sq_entries)
        self._in_flight = 0

    def _counter(self, offset: int) -> NDArray[np.uint32]:
        return np.frombuffer(self._queues, np.uint32, 1, offset)

    def run(self, op: Op, fd: int, requests: Sequence[Request], done: Done) -> None:
        iovecs, sqes = _entries(op, fd, requests)
        filled = 0
        try:
            while filled < len(sqes) or self._in_flight:
                fresh = sqes[filled : filled + DEPTH - self._in_flight]
                self._fill(fresh)
                filled += len(fresh)
                self._enter()
                for number, result in self._reap():
                    done(number, result)
        finally:
            self._drain()
            del iovecs  # the kernel read them when it took the entries, not before

    def _fill(self, sqes: NDArray[np.void]) -> None:
        tail = int(self._sq_tail[0])
        self._sqes[(tail + np.arange(len(sqes))) % len(self._sqes)] = sqes
        self._sq_tail[0] = (tail + len(sqes)) & 0xFFFFFFFF
        self._in_flight += len(sqes)

    def _enter(self) -> None:
        """Submit what is queued, and wait until at least one request is complete."""
        while True:
            queued = (int(self._sq_tail[0]) - int(self._sq_head[0])) & 0xFFFFFFFF
            try:
                _call(_ENTER, self._fd, queued, 1, _ENTER_GETEVENTS)
                return
            except InterruptedError:
                continue  # a signal; Python has run its handler by the time we are here

    def _reap(self) -> list[tuple[int, int]]:
        head, tail = int(self._cq_head[0]), int(self._cq_tail[0])
        count = (tail - head) & 0xFFFFFFFF
        cqes = self._cqes[(head + np.arange(count)) % len(self._cqes)]
        self._cq_head[0] = tail
        self._in_flight -= count
        return list(zip(cqes["user_data"].tolist(), cqes["result"].tolist(), strict=True))

    def _drain(self) -> None:
        """Leave nothing in flight: buffers are about to be used for something else."""
        while self._in_flight:
            # What was never taken by the kernel is withdrawn.
            queued = (int(self._sq_tail[0]) - int(self._sq_head[0])) & 0xFFFFFFFF
            self._sq_tail[0] = self._sq_head[0]
            self._in_flight -= queued
            if self._in_flight:
                self._enter()
                self._reap()

    def close(self) -> None:
        # The views hold the mappings open.
        del self._sqes, self._cqes
        del self._sq_head, self._sq_tail, self._cq_head, self._cq_tail
        self._entries.close()
        self._queues.close()
        os.close(self._fd)


def _entries(
    op: Op, fd: int, requests: Sequence[Request]
) -> tuple[NDArray[np.void], NDArray[np.void]]:
    """The iovecs of all requests, and a submission entry for each that points to its own."""
    buffers = [buffer for request in requests for buffer in request.buffers]
    iovecs = np.zeros(len(buffers), _IOVEC)
    iovecs["base"] = [where for request in requests for where in request.addresses]
    iovecs["length"] = [buffer.nbytes for buffer in buffers]
    counts = np.array([len(request.buffers) for request in requests], dtype=np.uint64)
    firsts = np.cumsum(counts) - counts
    sqes = np.zeros(len(requests), _SQE)
    sqes["opcode"] = _OPCODES[op]
    sqes["fd"] = fd
    sqes["offset"] = [request.offset for request in requests]
    sqes["iovecs"] = np.uint64(iovecs.ctypes.data) + firsts * np.uint64(_IOVEC.itemsize)
    sqes["iovec_count"] = counts
    sqes["user_data"] = np.arange(len(requests))
    return iovecs, sqes


def _call(number: int, *arguments: int) -> int:
    padded = arguments + (0,) * (6 - len(arguments))
    result = int(_syscall(number, *padded))
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result
